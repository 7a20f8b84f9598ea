"""Tensor parallelism: each rank of a stage holds a slice of the weights and talks through `Links`, never on its own.

The plan is transformers' (`base_model_tp_plan`), read as data; GPT-2, which has none, has one here. Three steps:

1. `plan_splits` decides on the meta model which parameter is split along which dimension, and refuses what it cannot.
2. `place_splits` puts DTensor placeholders in, so that transformers' loader reads only this rank's slices.
3. `install_splits` makes plain local tensors of them and wraps the forwards of the modules that must talk.

transformers' own parallel forwards are not used: they reduce with a ring all-reduce, whose order of addition depends on
where a row lies. Here the only reduction is `Links.ordered_sum`.

Layout of a packed column-parallel output (several projections in one matrix, such as GPT-2's c_attn) over 2 ranks:

    whole   [ q0 q1 | k0 k1 | v0 v1 ]        rank 0   [ q0 | k0 | v0 ]        rank 1   [ q1 | k1 | v1 ]

so a concatenation over ranks is not the whole: whoever gathers such an output needs its `blocks`.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.pytorch_utils import Conv1D

from engine.links import Distributed, Links
from polytrace.errors import ServiceError


class Style(Enum):
    """How a module is split."""

    COLUMN = "column"  # its output features; the output stays split
    COLUMN_GATHERED = "column gathered"  # its output features; every rank gets the whole output
    ROW = "row"  # its input features, of an input that is split; the outputs are summed
    ROW_OF_WHOLE = "row of whole"  # its input features, of an input that every rank has whole; the outputs are summed
    VOCABULARY = "vocabulary"  # an embedding's tokens; a rank answers zeros for the others' tokens, and all are summed


# transformers' names. A packed style's blocks are those of transformers: gate and up projections in one matrix.
_STYLES: Mapping[str, tuple[Style, int]] = {
    "colwise": (Style.COLUMN, 1),
    "packed_colwise": (Style.COLUMN, 2),
    "colwise_gather_output": (Style.COLUMN_GATHERED, 1),
    "colwise_rep": (Style.COLUMN_GATHERED, 1),
    "rowwise": (Style.ROW, 1),
    "rowwise_split_input": (Style.ROW_OF_WHOLE, 1),
    "rowwise_rep": (Style.ROW_OF_WHOLE, 1),
    "embedding_rowwise": (Style.VOCABULARY, 1),
}
_WHOLE = {"replicate", "replicated_with_grad_allreduce"}  # every rank has all of it and the forward needs nothing

# Families without a plan of transformers: module pattern -> (style, blocks). The tied embedding and head stay whole.
_OWN_PLANS: Mapping[str, Mapping[str, tuple[Style, int]]] = {
    "gpt2": {
        "transformer.h.*.attn.c_attn": (Style.COLUMN, 3),
        "transformer.h.*.attn.c_proj": (Style.ROW, 1),
        "transformer.h.*.mlp.c_fc": (Style.COLUMN, 1),
        "transformer.h.*.mlp.c_proj": (Style.ROW, 1),
    }
}
_ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "qkv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one module's weights lie over the ranks of its stage."""

    module: str
    style: Style
    blocks: int  # projections side by side in the output features, each split over the ranks; 1: an ordinary matrix
    dims: Mapping[str, int | None]  # the module's own parameter -> dimension split over the ranks; None: whole
    size: int  # of the split dimension, over all ranks


def plan_splits(model: nn.Module, ranks: int) -> tuple[Split, ...]:
    """What to split over `ranks`, for the weights that this (windowed, meta) model has.

    ServiceError with the way out when the model has no plan, a style that is not supported here, or sizes that do not
    divide. An embedding or head whose vocabulary does not divide stays whole, and so does what is tied to it.
    """
    if ranks == 1:
        return ()
    wanted = _wanted(model, ranks)
    modules = dict(model.named_modules())
    splits = {path: _split(path, modules[path], style, blocks) for path, (style, blocks) in wanted.items()}
    _check_sizes(model, splits, ranks)
    whole = {p for p, s in splits.items() if s.style in _OF_VOCABULARY and s.size % ranks}
    tied: Any = getattr(model, "all_tied_weights_keys", {})
    for target, source in tied.items():
        pair = {target.rpartition(".")[0], source.rpartition(".")[0]}
        if pair & whole or len(pair & splits.keys()) == 1:
            whole |= pair
    return tuple(split for path, split in splits.items() if path not in whole)


def place_splits(model: nn.Module, splits: tuple[Split, ...], links: Links, device_type: str) -> None:
    """Replace the split parameters of a meta model by placeholders that tell the loader which slice is ours.

    `device_type` is that of the device to which they are read.
    """
    if not splits:
        return
    assert isinstance(links, Distributed)
    mesh = DeviceMesh.from_group(links.rank_group, device_type, mesh_dim_names=("tp",))
    for split in splits:
        module = model.get_submodule(split.module)
        for name, dim in split.dims.items():
            whole = module.get_parameter(name)
            placement: Placement = Replicate() if dim is None else Shard(dim)
            if dim is not None and split.blocks > 1:
                placement = _StridedShard(dim, split_factor=split.blocks)
            placed = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=False))


def install_splits(model: nn.Module, splits: tuple[Split, ...], links: Links) -> None:
    """Make plain local tensors of the loaded placeholders and let the modules talk through `links`.

    Also the self-test of what we rely on in transformers and torch: ServiceError, with their versions, when a slice has
    not the expected shape or a placeholder was left.
    """
    _make_local(model)
    for split in splits:
        module = model.get_submodule(split.module)
        _check_local(module, split, links.ranks)
        _INSTALL[split.style](module, split, links)
    if any(split.blocks == 3 for split in splits):
        attentions: list[Any] = [module for module in model.modules() if hasattr(module, "split_size")]
        for attention in attentions:  # GPT-2 cuts q, k and v apart by this size
            attention.split_size //= links.ranks


_OF_VOCABULARY = (Style.VOCABULARY, Style.COLUMN_GATHERED)


def _wanted(model: nn.Module, ranks: int) -> dict[str, tuple[Style, int]]:
    """Module path -> (style, blocks), for modules that this model has with weights."""
    root: Any = model
    modules = {path: module for path, module in model.named_modules() if module._parameters}
    own = _OWN_PLANS.get(root.config.model_type)
    if own is not None:
        return {p: style for p in modules for pattern, style in own.items() if fnmatch.fnmatchcase(p, pattern)}
    if not root.tp_plan:
        name = type(model).__name__
        raise ServiceError(f"{name} has no tensor-parallel plan: use ranks=1 and split it into stages instead")
    plan = root._expand_parallel_plan(dict(root.tp_plan))
    wanted = {}
    for path, name in plan.items():
        parent, _, leaf = path.rpartition(".")
        is_parameter = parent in modules and leaf in modules[parent]._parameters
        if name in _WHOLE or (is_parameter and plan.get(parent) == name):
            continue
        module = modules.get(path)
        if name not in _STYLES or is_parameter or not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            if module is None and not is_parameter and name in _STYLES:
                continue  # a stub: the stage does not own it
            kind = type(module).__name__ if module is not None else "a parameter"
            raise ServiceError(
                f"{type(model).__name__} cannot be split over ranks: {path} ({kind}) has the style {name!r} and "
                f"supported are {', '.join(_STYLES)}; use ranks=1 and split it into stages instead"
            )
        wanted[path] = _STYLES[name]
    return wanted


def _split(path: str, module: nn.Module, style: Style, blocks: int) -> Split:
    # A Linear's weight is [out, in], a Conv1D's [in, out], an Embedding's [tokens, features].
    is_conv = isinstance(module, Conv1D)
    if style is Style.VOCABULARY:
        weight_dim = 0
    elif style in (Style.COLUMN, Style.COLUMN_GATHERED):
        weight_dim = 1 if is_conv else 0
    else:
        weight_dim = 0 if is_conv else 1
    is_column = style in (Style.COLUMN, Style.COLUMN_GATHERED)
    dims: dict[str, int | None] = {"weight": weight_dim}
    if module._parameters.get("bias") is not None:
        dims["bias"] = 0 if is_column else None  # a row-split module adds its bias once, after the sum
    return Split(
        module=path, style=style, blocks=blocks, dims=dims, size=module.get_parameter("weight").shape[weight_dim]
    )


def _check_sizes(model: nn.Module, splits: Mapping[str, Split], ranks: int) -> None:
    root: Any = model
    config = root.config.get_text_config(decoder=True)
    sizes: dict[str, int] = {}
    if any(path.rpartition(".")[2] in _ATTENTION_INPUTS for path in splits):
        sizes["attention heads"] = config.num_attention_heads
        sizes["key/value heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for path, split in splits.items():
        if split.style not in _OF_VOCABULARY:
            sizes[f"features of {path}"] = split.size // split.blocks
    common = math.gcd(*sizes.values()) if sizes else 0
    if sizes and common % ranks:
        allowed = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        what, size = next((what, size) for what, size in sizes.items() if size % ranks)
        raise ServiceError(
            f"{type(model).__name__} has {size} {what}, which {ranks} ranks cannot share: use ranks {allowed}"
        )


def _make_local(model: nn.Module) -> None:
    """Plain tensors for DTensors; parameters that were one object (tied) stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters: dict[str, Any] = dict(module._parameters)
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(parameter.to_local(), requires_grad=False)
                module._parameters[name] = made[id(parameter)]


def _check_local(module: nn.Module, split: Split, ranks: int) -> None:
    weight, dim = module.get_parameter("weight"), split.dims["weight"]
    assert dim is not None
    if weight.is_meta or weight.shape[dim] * ranks != split.size:
        versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
        raise ServiceError(
            f"{ranks} ranks share {split.size} features of {split.module}, but the slice is {tuple(weight.shape)} on "
            f"{weight.device}: {versions} do not load slices as polytrace expects"
        )


def _install_column(module: nn.Module, split: Split, links: Links) -> None:
    if isinstance(module, Conv1D):
        module.nf //= links.ranks  # its forward makes the output's shape from this


def _install_column_gathered(module: nn.Module, split: Split, links: Links) -> None:
    _install_column(module, split, links)
    local: Callable[..., Tensor] = module.forward
    module.forward = lambda x: links.gather(local(x), -1)


def _install_row(module: nn.Module, split: Split, links: Links) -> None:
    def forward(x: Tensor) -> Tensor:
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        if split.style is Style.ROW_OF_WHOLE:
            x = x.unflatten(-1, (links.ranks, -1)).select(-2, links.rank)
        product = x @ weight if isinstance(module, Conv1D) else F.linear(x, weight)
        total = links.ordered_sum(product)
        return total if bias is None else total + bias

    module.forward = forward


def _install_vocabulary(module: nn.Module, split: Split, links: Links) -> None:
    embedding: Any = module
    embedding.padding_idx = None  # only matters for gradients, and may lie outside this rank's slice
    tokens = split.size // links.ranks
    first = tokens * links.rank
    local: Callable[..., Tensor] = module.forward

    def forward(ids: Tensor) -> Tensor:
        is_elsewhere = (ids < first) | (ids >= first + tokens)
        found = local((ids - first).masked_fill(is_elsewhere, 0))
        return links.ordered_sum(found.masked_fill(is_elsewhere.unsqueeze(-1), 0))

    module.forward = forward


_INSTALL: Mapping[Style, Callable[[nn.Module, Split, Links], None]] = {
    Style.COLUMN: _install_column,
    Style.COLUMN_GATHERED: _install_column_gathered,
    Style.ROW: _install_row,
    Style.ROW_OF_WHOLE: _install_row,
    Style.VOCABULARY: _install_vocabulary,
}
