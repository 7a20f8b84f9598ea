"""The names that every decoder has, found by structure: embedding, layers, final norm, head; in a layer attention and
MLP, what these take and give; and how many heads there are and how large.

What has no such thing, or has it in another way, gets a refusal with the reason. Knows no model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from engine.anatomy import Anatomy, signature
from engine.parts import Block
from polytrace.description import FactInfo, Leaf, PartInfo, PointInfo, SiteInfo
from polytrace.graph import Port, Site
from polytrace.tree import join

Sites = Mapping[tuple[str, Port], SiteInfo]  # first visits


@dataclass(frozen=True, slots=True, kw_only=True)
class StandardNames:
    """Of a model."""

    modules: Mapping[str, str]  # standard names of the root and the paths that they lead to
    refusals: Mapping[str, str]  # those that lead nowhere -> why
    parts: tuple[PartInfo, ...]
    points: tuple[PointInfo, ...]
    facts: tuple[FactInfo, ...]


def find_standard_names(model: PreTrainedModel, layers: str, anatomy: Anatomy, at: Sites) -> StandardNames:
    """All of them."""
    modules = find_standard_modules(model, layers, anatomy)
    width = model.config.get_text_config(decoder=True).hidden_size
    parts: list[PartInfo] = []
    points = list(_root_points(modules, at))
    listed: Any = model.get_submodule(layers)
    for number, layer in enumerate(listed):
        kind, path = anatomy.kinds.get(signature(layer)), f"{layers}.{number}"
        attention, mlp = (None, None) if kind is None else (kind.attention_block, kind.mlp_block)
        for name, block in (("attention", attention), ("mlp", mlp)):
            part = _PARTS[name]
            found = _part(path, part, block, _NO_TWIN if kind is None else _NO_BLOCK[name])
            parts.append(replace(found, is_parallel=kind is not None and kind.is_parallel))
            for side in _SIDES:
                points.append(_point(path, f"{name}_{side}", block, side, at, width, parts[-1]))
    refusals = {name: why for name, why in _NO_MODULE.items() if name not in modules}
    facts = tuple(_facts(model, layers, len(listed), at))
    return StandardNames(modules=modules, refusals=refusals, parts=tuple(parts), points=tuple(points), facts=facts)


def find_standard_modules(model: PreTrainedModel, layers: str, anatomy: Anatomy) -> dict[str, str]:
    """Standard names and the paths that they lead to; a name is missing where the model has no such module."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = {
        "embed_tokens": paths.get(id(model.get_input_embeddings())),
        "layers": layers,
        "ln_final": anatomy.final_norm,
        "lm_head": paths.get(id(model.get_output_embeddings())),
    }
    return {name: path for name, path in found.items() if path is not None}


def _root_points(modules: Mapping[str, str], at: Sites) -> Sequence[PointInfo]:
    """What goes into the model and comes out of it."""
    embedding = modules.get("embed_tokens")
    sides: tuple[tuple[str, str | None, Port, tuple[int | str, ...]], ...] = (
        ("input_ids", embedding, Port.INPUT, ()),
        ("token_embeddings", embedding, Port.OUTPUT, ()),
        ("logits", "", Port.OUTPUT, ("logits",)),
    )
    points = []
    for name, module, port, selector in sides:
        info = None if module is None else at.get((module, port))
        if module is None or info is None or selector not in {leaf.selector for leaf in info.leaves}:
            points.append(PointInfo(module="", name=name, site=None, refusal=_NO_TENSOR[name]))
            continue
        site = Site(module=module, port=port, selector=selector)
        told = _IDS_ARE_GIVEN if name == "input_ids" else None
        points.append(PointInfo(module="", name=name, site=site, write_refusal=told))
    return points


def _part(layer: str, name: str, block: Block | None, why_not: str) -> PartInfo:
    if block is None:
        return PartInfo(module=layer, name=name, path=None, refusal=why_not)
    if block.module == "" and block.given is None:
        return PartInfo(module=layer, name=name, path=None, refusal=_SEVERAL)
    if block.module == "":
        return PartInfo(module=layer, name=name, path=None, refusal=_IN_THE_LAYER.format(block.given))
    return PartInfo(module=layer, name=name, path=join(layer, block.module))


def _point(layer: str, name: str, block: Block | None, side: str, at: Sites, width: int, part: PartInfo) -> PointInfo:
    """What a block takes, gives or adds to the residual, one tensor as wide as that."""
    if block is None or (block.given is None and block.taken is None):
        return PointInfo(module=layer, name=name, site=None, refusal=part.refusal)
    module = {"input": block.taken, "output": block.given, "added": block.added}[side]
    port = Port.INPUT if side == "input" else Port.OUTPUT
    info = None if module is None else at.get((join(layer, module), port))
    leaf = None if info is None else _hidden(info.leaves, width)
    if info is None or leaf is None:
        refusal = (
            _NOT_ADDED.format(note=block.note or "") if side == "added" else _NO_SIDE.format(width=width, side=side)
        )
        return PointInfo(module=layer, name=name, site=None, refusal=refusal.rstrip(": "))
    site = Site(module=info.module, port=port, selector=leaf.selector)
    return PointInfo(module=layer, name=name, site=site, note=block.note if side == "output" else None)


def _hidden(leaves: Sequence[Leaf], width: int) -> Leaf | None:
    """The tensor itself, or the first of a tuple."""
    return next((leaf for leaf in leaves if leaf.selector in ((), (0,)) and leaf.tail == (width,)), None)


def _facts(model: PreTrainedModel, layers: str, num_layers: int, at: Sites) -> Iterator[FactInfo]:
    """As attention is given them, layer by layer; where none was seen, as the modules or the configuration say."""
    attending: dict[str, list[int]] = {"num_heads": [], "num_kv_heads": [], "head_dim": []}
    others: set[tuple[int, int]] = set()  # (features of a query, of a value) where these differ
    listed: Any = model.get_submodule(layers)
    for number in range(num_layers):
        inside = f"{layers}.{number}."
        for module, port in at:
            if port is Port.Z and f"{module}.".startswith(inside):
                heads, value = at[module, Port.Z].leaves[0].tail
                _, size = _first(at, module, (Port.Q_ROT, Port.Q)) or (heads, value)
                others |= {(size, value)} if value != size else set()
                groups, _ = _first(at, module, (Port.K_ROT, Port.K)) or (_counted(listed[number]), size)
                for name, count in (("num_heads", heads), ("num_kv_heads", groups), ("head_dim", size)):
                    attending[name] += [] if count is None else [count]
    if not attending["num_kv_heads"] and (counts := [own for own in map(_counted, listed) if own is not None]):
        attending["num_kv_heads"] = counts
    text = model.config.get_text_config(decoder=True)
    for name, values in attending.items():
        refusal, told = None, None if values else _told(text, name)
        if name == "head_dim" and others:
            refusal = _TWO_SIZES.format(others=", ".join(f"{size} and {value}" for size, value in sorted(others)))
        elif not values and told is None:
            refusal = _NO_FACT
        own = values if told is None else [told]
        yield FactInfo(name=name, values=tuple(own[:1] if len(set(own)) == 1 else own), refusal=refusal)
    logits = next((leaf for leaf in at["", Port.OUTPUT].leaves if leaf.selector == ("logits",)), None)
    width = None if logits is None else logits.tail[-1]
    refusal = None if width in (None, text.vocab_size) else _OTHER_LOGITS.format(width=width, told=text.vocab_size)
    yield FactInfo(name="vocab_size", values=(text.vocab_size,), refusal=refusal)


def _first(at: Sites, module: str, ports: Sequence[Port]) -> Sequence[int] | None:
    """(heads, features) of the first of these points that an attention module has."""
    return next((at[module, port].leaves[0].tail for port in ports if (module, port) in at), None)


def _counted(layer: nn.Module) -> int | None:
    """Key/value heads, as a module of a layer says by itself; None where none does, or several differ."""
    names = ("num_kv_heads", "num_key_value_heads")
    found = {own for module in layer.modules() for name in names if type(own := getattr(module, name, None)) is int}
    return found.pop() if len(found) == 1 else None


def _told(text: Any, name: str) -> int | None:
    """What the configuration says by itself; its own map of attributes knows what a family calls it."""
    for key in _KEYS[name]:
        try:
            value = getattr(text, key, None)
        except RuntimeError:  # heterogeneous configurations, of what varies by layer
            return None
        if isinstance(value, int):
            return value
    heads = _told(text, "num_heads") if name == "head_dim" else None
    return text.hidden_size // heads if heads else None


_SIDES = ("input", "output", "added")
_PARTS = {"attention": "self_attn", "mlp": "mlp"}
_KEYS = {
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "head_dim": ("head_dim",),
}
_NO_TWIN = "no tiny twin of this family could be run, which tells what its parts are"
_NO_BLOCK = {
    "attention": "no module of this layer attends, or several do",
    "mlp": "no projection back to the residual behind an activation was found in this layer, and no experts",
}
_IN_THE_LAYER = "its parts ({}, ...) lie in the layer itself, not in a module of their own"
_SEVERAL = "modules of this layer give its parts one by one, and nothing gives their sum"
_NO_SIDE = "this forward has no tensor of {width} features as its {side}"
_NOT_ADDED = "no tensor of this forward is what is added to the residual: {note}"
_NO_MODULE = {
    "embed_tokens": "the model has no embedding of tokens that is a module",
    "ln_final": "no module behind the layers takes what the last one gives and gives what the head takes",
    "lm_head": "the model has no head that is a module",
}
_NO_TENSOR = {
    "input_ids": "the embedding of tokens is not called with ids",
    "token_embeddings": "no module of this model gives the embeddings of tokens",
    "logits": "what this model returns has no logits",
}
_IDS_ARE_GIVEN = (
    "a prompt's tokens are known before it runs: give trace(...) other ids, or assign model.token_embeddings"
)
_TWO_SIZES = "queries and values of a head have {others} features: take `layer.q_rot.shape[-1]` or `layer.z.shape[-1]`"
_OTHER_LOGITS = "a token has {width} logits and the configuration says {told}"
_NO_FACT = "neither its attention nor its configuration tells"
