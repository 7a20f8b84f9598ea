"""Which of TransformerLens's activations a model has, in the order in which they come, and what each stands for."""

from __future__ import annotations

from collections.abc import Iterator

from polytrace.grammar import nearest
from polytrace.lines import user_line
from polytrace.methods.transformer_lens.access import Access, Difference, Normalized, Point, ReadOnly, Scale
from polytrace.methods.transformer_lens.blocks import Block, linear_of, positions_of
from polytrace.methods.transformer_lens.facts import Facts
from polytrace.methods.transformer_lens.names import ABSENT, BLOCK, block_of
from polytrace.model import Model
from polytrace.modules import Module
from polytrace.tree import NoSuchNameError

_POINTS = {
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_rot_q": "q_rot",
    "attn.hook_rot_k": "k_rot",
    "attn.hook_attn_scores": "scores",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "z",
    "attn.hook_result": "head_out",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
}
_ADDED = {True: "attention_added", False: "mlp_added"}  # by whether it is attention
_SHARED_NORM = "attention and the MLP take what the same norm gives: change `attn.hook_q`, `mlp.hook_pre` and the like"


class HookTable:
    """The activations of a model by name."""

    def __init__(self, model: Model, blocks: tuple[Block, ...], facts: Facts) -> None:
        self.model, self.blocks, self.facts = model, blocks, facts
        has_rotation = any("rope" in name or "rotary" in name for name in model.config)
        self.is_rotary = has_rotation and "W_pos" not in model._index.parameters
        self._known: dict[str, Access] = {}
        self._refused: dict[str, str] = {}
        self._order = {name: number for number, name in enumerate(self._names())}

    def names(self) -> tuple[str, ...]:
        """All of them, in the model's order."""
        return tuple(self._order)

    def place(self, name: str) -> int:
        """Where in the model's order it comes. Raises NoSuchNameError, which says why."""
        if name not in self._order:
            raise NoSuchNameError(f"this model has no activation {name!r}{self._instead(name)}", where=user_line())
        return self._order[name]

    def access(self, name: str) -> Access:
        """How it is read and written."""
        self.place(name)
        if name not in self._known:
            self._known[name] = self._make(name)
        return self._known[name]

    # which there are

    def _names(self) -> Iterator[str]:
        yield "hook_embed"
        if positions_of(self.model) is not None:
            yield "hook_pos_embed"
        for number, block in enumerate(self.blocks):
            layer = self.model.layers[number]
            for short in BLOCK:
                reason = self._missing(layer, block, short)
                if reason is None:
                    yield f"blocks.{number}.{short}"
                else:
                    self._refused[f"blocks.{number}.{short}"] = reason
        if "ln_final" in self.model.description.standard:
            yield from ("ln_final.hook_scale", "ln_final.hook_normalized")
        yield from ("unembed.hook_in", "unembed.hook_out")

    def _missing(self, layer: Module, block: Block, short: str) -> str | None:
        """Why a block has no such activation; "" where TransformerLens would have none either."""
        part = short.partition(".")[0]
        if part in ("ln1", "ln2", "ln1_post", "ln2_post"):
            return "" if getattr(block, part) is None else None
        if short in ("attn.hook_rot_q", "attn.hook_rot_k") and not self.is_rotary:
            return "queries and keys of this model are not rotated"
        if short == "mlp.hook_pre_linear":
            return "" if linear_of(self.model, block) is None else None
        if short == "hook_mlp_in":
            return "" if block.ln2 is None or block.has_one_norm else None
        if short in ("hook_attn_out", "hook_mlp_out"):
            is_attention = short == "hook_attn_out"
            is_between = "resid_mid" in layer.points and not block.is_parallel
            added = "attention" if is_attention else "the MLP"
            told = f"no module of {block.path} gives what {added} adds to the residual, and no state of it lies between"
            return None if is_between or _ADDED[is_attention] in layer.points else told
        if short in _POINTS and _POINTS[short] not in layer.points:
            owner = layer._points.get(_POINTS[short], block.path)
            info = self.model._index.points.get(owner, {}).get(_POINTS[short])
            return "" if info is None or info.refusal is None else info.refusal
        return None

    def _instead(self, name: str) -> str:
        reason = self._refused.get(name) or ABSENT.get(name.rpartition(".")[2])
        if reason is not None:
            return f": {reason}"
        number = block_of(name)
        if number is not None and number >= len(self.blocks):
            return f": it has blocks 0-{len(self.blocks) - 1}"
        return nearest(name, self._order)

    # what they stand for

    def _make(self, name: str) -> Access:
        number = block_of(name)
        if number is None:
            return self._outside(name)
        block, short = self.blocks[number], name.split(".", 2)[2]
        layer = self.model.layers[number]
        part, _, hook = short.rpartition(".")
        if short in _POINTS:
            return Point(layer, _POINTS[short])
        if part in ("ln1", "ln2", "ln1_post", "ln2_post"):
            made = self._norm(f"blocks.{number}.{part}", hook, getattr(block, part))
            return ReadOnly(name, made, _SHARED_NORM) if block.has_one_norm else made
        if short == "mlp.hook_pre_linear":
            return self._output(linear_of(self.model, block))
        if short == "hook_mlp_in":
            return Point(self._module(block.ln2), "input")
        return _added(layer, is_attention=short == "hook_attn_out")

    def _outside(self, name: str) -> Access:
        model, positions = self.model, positions_of(self.model)
        if name in ("ln_final.hook_scale", "ln_final.hook_normalized"):
            return self._norm("ln_final", name.rpartition(".")[2], model.description.standard["ln_final"])
        if name in ("unembed.hook_in", "unembed.hook_out"):
            return Point(model.lm_head, name.rpartition("hook_")[2] + "put")
        first = Point(model.layers[0], "resid_pre")
        if positions is None:
            return first  # whatever the family multiplies embeddings with is in it
        if name == "hook_pos_embed":
            return self._output(positions)
        if self.facts.embed_sums:
            return Point(model.embed_tokens, "output")
        return Difference(self._output(positions), first)

    def _norm(self, start: str, hook: str, path: str) -> Scale | Normalized:
        module = self._module(path)
        kind = self.model._index.modules[path].class_name
        scale = Scale(f"{start}.hook_scale", module, self.facts.norms[kind])
        if hook == "hook_scale":
            return scale
        return Normalized(f"{start}.hook_normalized", module, scale.facts, scale)

    def _output(self, path: str | None) -> Point:
        return Point(self._module(path), "output")

    def _module(self, path: str | None) -> Module:
        assert path is not None
        return self.model.get_submodule(path)


def _added(layer: Module, *, is_attention: bool) -> Access:
    """What attention or the MLP adds: one tensor of the forward, or what lies between two states of the residual."""
    if _ADDED[is_attention] in layer.points:
        return Point(layer, _ADDED[is_attention])
    before, behind = ("resid_pre", "resid_mid") if is_attention else ("resid_mid", "resid_post")
    return Difference(Point(layer, before), Point(layer, behind))
