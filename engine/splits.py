"""How a model's weights lie over the ranks of a stage: decided on the meta model, before anything is read.

The plan is transformers' (`base_model_tp_plan`, and `base_model_ep_plan` for experts that it does not split), read as
data; families that have none, and that their sizes and forwards allow to split, have one here. Knows nothing of
processes or weights: `engine.parallel` does what is decided here, `engine.twins` proves it before a model serves.

Layout of a dimension over 4 ranks: two blocks (gate and up in one matrix), each cut into 4; and two key/value heads, of
which every rank holds the one that its query heads attend to, so that each is held by 2 ranks:

    blocks=2    rank 0 [ g0 | u0 ]   rank 1 [ g1 | u1 ]   rank 2 [ g2 | u2 ]   rank 3 [ g3 | u3 ]
    copies=2    rank 0 [ k0 ]        rank 1 [ k0 ]        rank 2 [ k1 ]        rank 3 [ k1 ]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from engine.imaged import image_parts
from engine.own_plans import OWN_PLANS
from polytrace.errors import ServiceError


class Style(Enum):
    """How a module is split."""

    COLUMN = "column"  # its output features; the output stays split
    COLUMN_GATHERED = "column gathered"  # its output features; every rank gets the whole output
    ROW = "row"  # its input features, of an input that is split; the outputs are summed
    ROW_OF_WHOLE = "row of whole"  # its input features, of an input that every rank has whole; the outputs are summed
    VOCABULARY = "vocabulary"  # an embedding's tokens; a rank answers zeros for the others' tokens, and all are summed
    EXPERTS_CUT = "experts cut"  # every expert's inner features; the outputs are summed
    EXPERTS_DEALT = "experts dealt"  # each rank has some whole experts; the outputs are summed
    OWN_TENSORS = "own tensors"  # parameters that its forward uses beside split projections; nothing is summed


SUMMING = frozenset({Style.ROW, Style.ROW_OF_WHOLE, Style.VOCABULARY, Style.EXPERTS_CUT, Style.EXPERTS_DEALT})

# transformers' names for modules that are one matrix. A packed one has gate and up projections side by side.
_MATRICES: Mapping[str, tuple[Style, int]] = {
    "colwise": (Style.COLUMN, 1),
    "packed_colwise": (Style.COLUMN, 2),
    "colwise_gather_output": (Style.COLUMN_GATHERED, 1),
    "colwise_rep": (Style.COLUMN_GATHERED, 1),
    "rowwise": (Style.ROW, 1),
    "rowwise_split_input": (Style.ROW_OF_WHOLE, 1),
    "rowwise_rep": (Style.ROW_OF_WHOLE, 1),
    "embedding_rowwise": (Style.VOCABULARY, 1),
    "fused_qkv": (Style.COLUMN, 3),  # ours: queries, keys and values side by side
}
# Those for modules whose own parameters have an entry each, and for these: the dimension from the end, and blocks.
_HOLDERS: Mapping[str, Style] = {
    "moe_tp_experts": Style.EXPERTS_CUT,
    "ep_dispatch_experts": Style.EXPERTS_DEALT,
    "local_params": Style.OWN_TENSORS,
}
_TENSORS: Mapping[str, tuple[int, int]] = {
    "colwise": (-2, 1),
    "packed_colwise": (-2, 2),
    "rowwise": (-1, 1),
    "packed_rowwise": (-1, 2),
}
_DEALT = "grouped_gemm"  # a parameter of which each rank has some experts
# Every rank has all of it, and the forward needs nothing.
_LATENT = "mla_kv_a_proj"
_WHOLE = {"replicate", "replicated_with_grad_allreduce", _LATENT}


_KEY_VALUES = ("k_proj", "v_proj")
_QUERIES = ("q_proj", "q_b_proj", "kv_b_proj")  # the latter two of latent attention: one head's features after another
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "qkv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """How one dimension of a tensor lies over the ranks of its stage."""

    dim: int
    size: int  # of the whole
    blocks: int = 1  # equal ones side by side, each split over the ranks
    copies: int = 1  # neighbouring ranks that hold the same

    def held(self, ranks: int) -> int:
        """The size of the dimension on each rank."""
        return self.size * self.copies // ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one module's own parameters lie over the ranks of its stage."""

    module: str
    style: Style
    parts: Mapping[str, Part | None]  # its own parameter -> None when every rank has all of it

    @property
    def part(self) -> Part:
        """Of the parameter that says how the module's features lie: its weight, where it is one matrix."""
        return self.parts.get("weight") or next(part for part in self.parts.values() if part is not None)

    @property
    def blocks(self) -> int:
        """Of the output features, where these stay split."""
        return self.part.blocks if self.style is Style.COLUMN else 1


def plan_splits(model: nn.Module, ranks: int) -> tuple[Split, ...]:
    """What to split over `ranks`, for the weights that this (windowed, meta) model has.

    ServiceError with the way out when the model has no plan, a style that is not supported here, or sizes that do not
    divide. An embedding, a head or another matrix whose output is gathered stays whole when it does not divide, and so
    does what is tied to it. Where there are more ranks than key/value heads, ranks have copies of these.
    """
    if ranks == 1:
        return ()
    plan = _plan_of(model)
    modules = dict(model.named_modules())
    splits: dict[str, Split] = {}
    for path, style, tensors in _wanted(model, plan):
        splits[path] = _split(path, modules[path], style, tensors, _key_value_heads(model, path), ranks)
    if not any(part.isdigit() for path in splits for part in path.split(".")):
        raise ServiceError(_no_plan(model))
    _check_sizes(model, splits, ranks)
    whole = {p for p, s in splits.items() if s.style in _MAY_STAY_WHOLE and s.part.size % ranks}
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        pair = {target.rpartition(".")[0], source.rpartition(".")[0]}
        if pair & whole or len(pair & splits.keys()) == 1:
            whole |= pair
    return tuple(split for path, split in splits.items() if path not in whole)


def shared_keys(model: nn.Module) -> Mapping[str, int]:
    """Modules of latent attention that every rank has whole -> how many features at the end of their outputs go right
    into each rank's own heads: the rotary part of all heads' keys.
    """
    root: Any = model
    config = root.config.get_text_config(decoder=True)
    modules = dict(model.named_modules())
    plan = _plan_of(model)
    return {path: config.qk_rope_head_dim for path, name in plan.items() if name == _LATENT and path in modules}


def counts_of_heads(model: nn.Module) -> tuple[str, ...]:
    """Attributes of attention modules that must count what a rank has: their forwards cut tensors by them."""
    root: Any = model
    own = OWN_PLANS.get(root.config.model_type)
    return own.counts if own is not None else ()


def blocks_of(splits: tuple[Split, ...]) -> Mapping[str, int]:
    """Module (its output) or parameter -> the blocks that the ranks split one by one, where there are several."""
    blocks = {split.module: split.blocks for split in splits}
    for split in splits:
        blocks.update({f"{split.module}.{name}": part.blocks for name, part in split.parts.items() if part is not None})
    return {path: number for path, number in blocks.items() if number > 1}


def is_of_heads(split: Split) -> bool:
    """Whether it splits attention by its heads."""
    leaf = split.module.rpartition(".")[2]
    return split.style is Style.COLUMN and leaf in (*_KEY_VALUES, *_QUERIES, *_FUSED)


_MAY_STAY_WHOLE = (Style.VOCABULARY, Style.COLUMN_GATHERED)


def _no_plan(model: nn.Module) -> str:
    name = type(model).__name__
    return f"{name} has no tensor-parallel plan for its layers: use ranks=1 and split it into stages instead"


def _plan_of(model: nn.Module) -> dict[str, str]:
    """Path of a module or parameter -> style name, for all that this model has."""
    root: Any = model
    own = OWN_PLANS.get(root.config.model_type)
    plan: dict[str, str] = dict(root.tp_plan if own is None else own.styles)
    if not plan:
        raise ServiceError(_no_plan(model))
    if not any(_HOLDERS.get(name) is Style.EXPERTS_CUT for name in plan.values()):
        plan |= {path: name for path, name in root.ep_plan.items() if name in (_DEALT, "ep_dispatch_experts")}
    expanded: dict[str, str] = root._expand_parallel_plan(plan)
    whole = tuple(f"{path}." for path in image_parts(model))  # on each rank: images are few, and it is small
    return {path: name for path, name in expanded.items() if not path.startswith(whole)}


def _wanted(
    model: nn.Module, plan: Mapping[str, str]
) -> Iterator[tuple[str, tuple[Style, int], Mapping[str, tuple[int, int]]]]:
    """Path, (style, blocks) of modules to split, and of parameters of those that are not one matrix (dim, blocks)."""
    modules = {path: module for path, module in model.named_modules() if module._parameters}
    supported = f"supported are {', '.join([*_MATRICES, *_HOLDERS])}; use ranks=1 and split it into stages instead"
    tensors: dict[str, dict[str, tuple[int, int]]] = {}
    for path, name in plan.items():
        if name in _WHOLE:
            continue
        parent, _, leaf = path.rpartition(".")
        owner, module = modules.get(parent), modules.get(path)
        if owner is not None and leaf in owner._parameters:
            dims = owner.get_parameter(leaf).ndim
            if plan.get(parent) == name:
                continue  # of one matrix: its module's entry says all
            if plan.get(parent) in _HOLDERS and (name == _DEALT or name in _TENSORS):
                dim, blocks = (0, 1) if name == _DEALT or dims == 1 else (dims + _TENSORS[name][0], _TENSORS[name][1])
                tensors.setdefault(parent, {})[leaf] = dim, blocks
                continue
            raise ServiceError(
                f"{type(model).__name__} cannot be split over ranks: the parameter {path} has the style {name!r} in "
                f"a module of the style {plan.get(parent)!r}; {supported}"
            )
        if module is None and (name in _MATRICES or name in _HOLDERS):
            continue  # a stub: the stage does not own it
        if name in _HOLDERS and path in tensors:
            yield path, (_HOLDERS[name], 1), tensors[path]
        elif name in _MATRICES and isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            yield path, _MATRICES[name], {}
        else:
            raise ServiceError(
                f"{type(model).__name__} cannot be split over ranks: {path} ({type(module).__name__}) has the style "
                f"{name!r} and {supported}"
            )


def _split(
    path: str,
    module: nn.Module,
    style: tuple[Style, int],
    tensors: Mapping[str, tuple[int, int]],
    key_value_heads: int | None,
    ranks: int,
) -> Split:
    kind, blocks = style
    if tensors:
        own: dict[str, Part | None] = dict.fromkeys(module._parameters)
        for name, (dim, packed) in tensors.items():
            own[name] = Part(dim=dim, size=module.get_parameter(name).shape[dim], blocks=packed)
        return Split(module=path, style=kind, parts=own)
    # A Linear's weight is [out, in], a Conv1D's [in, out], an Embedding's [tokens, features].
    is_column = kind in (Style.COLUMN, Style.COLUMN_GATHERED)
    is_first = kind is Style.VOCABULARY or is_column != isinstance(module, Conv1D)
    dim = 0 if is_first else 1
    size = module.get_parameter("weight").shape[dim]
    has_copies = kind is Style.COLUMN and key_value_heads is not None and ranks % key_value_heads == 0
    copies = ranks // key_value_heads if has_copies and key_value_heads is not None else 1
    parts: dict[str, Part | None] = {"weight": Part(dim=dim, size=size, blocks=blocks, copies=copies)}
    if module._parameters.get("bias") is not None:
        # A row-split module adds its bias once, after the sum.
        parts["bias"] = Part(dim=0, size=size, blocks=blocks, copies=copies) if is_column else None
    return Split(module=path, style=kind, parts=parts)


def _key_value_heads(model: nn.Module, path: str) -> int | None:
    """How many heads a key or value projection has, None for any other module. Layers of one model may differ."""
    parent, _, leaf = path.rpartition(".")
    if leaf not in _KEY_VALUES:
        return None
    attention: Any = model.get_submodule(parent)
    head_dim, keys = getattr(attention, "head_dim", None), getattr(attention, "k_proj", None)
    if not isinstance(head_dim, int) or not isinstance(keys, nn.Linear):
        return _config_heads(model)[1]
    return keys.weight.shape[0] // head_dim


def _config_heads(model: nn.Module) -> tuple[int, int]:
    root: Any = model
    config = root.config.get_text_config(decoder=True)
    heads: int = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


@dataclass(frozen=True, slots=True)
class _Demand:
    """Something that so many ranks must share evenly; with `may_repeat`, more ranks than there are may have copies."""

    what: str
    size: int
    may_repeat: bool = False

    def allows(self, ranks: int) -> bool:
        return self.size % ranks == 0 or (self.may_repeat and ranks % self.size == 0)


def _check_sizes(model: nn.Module, splits: Mapping[str, Split], ranks: int) -> None:
    demands = list(dict.fromkeys(_demands(model, splits)))
    refused = next((demand for demand in demands if not demand.allows(ranks)), None)
    if refused is None:
        return
    most = min(demand.size for demand in demands if not demand.may_repeat)
    allowed = [str(n) for n in range(1, most + 1) if all(demand.allows(n) for demand in demands)]
    raise ServiceError(
        f"{type(model).__name__} has {refused.size} {refused.what}, which {ranks} ranks cannot share: "
        f"use ranks {', '.join(allowed)}"
    )


def _demands(model: nn.Module, splits: Mapping[str, Split]) -> Iterator[_Demand]:
    heads, key_value_heads = _config_heads(model)
    for path, split in splits.items():
        leaf = path.rpartition(".")[2]
        if split.style in _MAY_STAY_WHOLE:
            continue
        if is_of_heads(split):
            yield _Demand("attention heads", heads)
        if split.style is Style.COLUMN and leaf in _FUSED:
            yield _Demand("key/value heads in one matrix with queries", key_value_heads)
        own = _key_value_heads(model, path)
        if split.style is Style.COLUMN and own is not None:
            yield _Demand("key/value heads", own, may_repeat=True)
        elif split.style is Style.EXPERTS_DEALT:
            yield _Demand("experts", split.part.size)
        elif split.style is Style.OWN_TENSORS:
            yield _Demand(f"elements of {path}", split.part.size)
        elif split.style is Style.EXPERTS_CUT:
            for name, part in split.parts.items():
                if part is not None:
                    yield _Demand(f"features of {path}.{name}", part.size // part.blocks)
        else:
            yield _Demand(f"features of {path}", split.part.size // split.part.blocks)
