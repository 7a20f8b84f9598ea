"""Tensor parallelism: each rank of a stage holds a slice of the weights and talks through `Links`, never on its own.

What is split how is decided in `engine.splits`, on the meta model. Here it is done, in two steps:

1. `place_splits` puts DTensor placeholders in, so that transformers' loader reads only this rank's slices.
2. `install_splits` makes plain local tensors of them and wraps the forwards of the modules that must talk.

transformers' own parallel forwards are not used: they reduce with a ring all-reduce, whose order of addition depends on
where a row lies. Here the only reduction is `Links.ordered_sum`, of gradients too (`engine.differentiable`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers.pytorch_utils import Conv1D

from engine.differentiable import gather, meet_arguments, met_by_many, met_end, ordered_sum, own_part
from engine.experts import deal_experts
from engine.head_outputs import with_change
from engine.links import Distributed, Links
from engine.splits import Part, Split, Style, counts_of_heads, shared_keys
from polytrace.errors import ServiceError


def place_splits(model: nn.Module, splits: tuple[Split, ...], links: Links, device_type: str) -> None:
    """Replace the split parameters of a meta model by placeholders that tell the loader which slice is ours.

    `device_type` is that of the device to which they are read.
    """
    if not splits:
        return
    assert isinstance(links, Distributed)
    meshes: dict[int, DeviceMesh] = {}
    for split in splits:
        module = model.get_submodule(split.module)
        for name, part in split.parts.items():
            copies = 1 if part is None else part.copies
            if copies not in meshes:
                meshes[copies] = _mesh(links, copies, device_type)
            whole = module.get_parameter(name)
            placed = distribute_tensor(whole, meshes[copies], [_placement(part)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=False))


def install_splits(model: nn.Module, splits: tuple[Split, ...], links: Links) -> None:
    """Make plain local tensors of the loaded placeholders and let the modules talk through `links`.

    ServiceError, with the versions of transformers and torch, when a slice has not the expected shape or a placeholder
    was left.
    """
    _make_local(model)
    root: Any = model
    head = root.get_output_embeddings()
    for split in splits:
        module = model.get_submodule(split.module)
        _check_local(module, split, links.ranks)
        # The output head's part of the vocabulary stays here: what is asked of the logits is mostly small.
        is_head = split.style is Style.COLUMN_GATHERED and module is head
        _INSTALL[Style.COLUMN if is_head else split.style](module, split, links)
    _count_heads(model, splits, links.ranks)
    if splits:
        for path, size in shared_keys(model).items():
            _install_shared_keys(model.get_submodule(path), size, links)


def _count_heads(model: nn.Module, splits: tuple[Split, ...], ranks: int) -> None:
    """Lets attention modules count what this rank has, where their forwards go by such numbers."""
    copies: dict[str, int] = {}  # of key/value heads, by the module that holds their projection
    for split in splits:
        parent = split.module.rpartition(".")[0]
        copies[parent] = max(split.part.copies, copies.get(parent, 1))
    counts = counts_of_heads(model)
    for path, number in copies.items():
        attention: Any = model.get_submodule(path)
        if all(hasattr(attention, name) for name in counts):
            for name in counts:
                setattr(attention, name, max(1, getattr(attention, name) // ranks))
        if number > 1 and hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups //= number


def _mesh(links: Distributed, copies: int, device_type: str) -> DeviceMesh:
    """The ranks that hold the distinct parts of a tensor, this one among them; every mesh of a stage is alike."""
    if copies == 1:
        return DeviceMesh.from_group(links.rank_group, device_type, mesh_dim_names=("tp",))
    first = links.stage * links.ranks
    own = range(first + links.rank % copies, first + links.ranks, copies)
    return _QuietMesh(device_type, list(own), mesh_dim_names=("tp",), _init_backend=False)


class _QuietMesh(DeviceMesh):
    """A mesh that nothing travels through: the loader only asks it for this rank's place, without a process group."""

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        coordinate = self.get_coordinate()
        assert coordinate is not None, "a rank is in its own mesh"
        return coordinate[0]


def _placement(part: Part | None) -> Placement:
    if part is None:
        return Replicate()
    return Shard(part.dim) if part.blocks == 1 else _StridedShard(part.dim, split_factor=part.blocks)


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
    for name, part in split.parts.items():
        local = module.get_parameter(name)
        if local.is_meta or (part is not None and local.shape[part.dim] != part.held(ranks)):
            size = "all" if part is None else f"{part.size} features"
            versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
            raise ServiceError(
                f"{ranks} ranks share {size} of {split.module}.{name}, but the slice is {tuple(local.shape)} on "
                f"{local.device}: {versions} do not load slices as polytrace expects"
            )


def _install_nothing(module: nn.Module, split: Split, links: Links) -> None:
    pass


def _install_column(module: nn.Module, split: Split, links: Links) -> None:
    if isinstance(module, Conv1D):
        module.nf = split.part.held(links.ranks)  # its forward makes the output's shape from this
    local: Callable[..., Tensor] = module.forward
    module.forward = lambda x: local(met_by_many(links, x))


def _install_column_gathered(module: nn.Module, split: Split, links: Links) -> None:
    _install_column(module, split, links)
    local: Callable[..., Tensor] = module.forward
    module.forward = lambda x: gather(links, local(x))


def _install_row(module: nn.Module, split: Split, links: Links) -> None:
    row: Any = module
    row.change, row.adds_changes = None, True

    def own_input(x: Tensor) -> Tensor:
        """What of the input meets this rank's weights."""
        return own_part(links, x) if split.style is Style.ROW_OF_WHOLE else x

    row.own_input = own_input

    def forward(x: Tensor) -> Tensor:
        weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
        x = own_input(x)
        product = x @ weight if isinstance(module, Conv1D) else F.linear(x, weight)
        change, row.change = row.change, None  # of what heads add here, see `engine.head_outputs`
        total = ordered_sum(links, with_change(product, change))
        return total if bias is None else total + bias

    module.forward = forward


def _install_vocabulary(module: nn.Module, split: Split, links: Links) -> None:
    embedding: Any = module
    embedding.padding_idx = None  # only matters for gradients, and may lie outside this rank's slice
    tokens = split.part.size // links.ranks
    first = tokens * links.rank
    local: Callable[..., Tensor] = module.forward

    def forward(ids: Tensor) -> Tensor:
        is_elsewhere = (ids < first) | (ids >= first + tokens)
        found = local((ids - first).masked_fill(is_elsewhere, 0))
        return links.ordered_sum(found.masked_fill(is_elsewhere.unsqueeze(-1), 0))

    module.forward = forward


def _install_experts(module: nn.Module, split: Split, links: Links) -> None:
    if split.style is Style.EXPERTS_DEALT:
        deal_experts(module, links.rank, links.ranks)
    local: Callable[..., Tensor] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = meet_arguments(links, args, kwargs)  # hidden states and routing weights
        return ordered_sum(links, local(*args, **kwargs))

    module.forward = forward


def _install_shared_keys(module: nn.Module, size: int, links: Links) -> None:
    local: Callable[..., Tensor] = module.forward
    module.forward = lambda x: met_end(links, local(x), size)


_INSTALL: Mapping[Style, Callable[[nn.Module, Split, Links], None]] = {
    Style.COLUMN: _install_column,
    Style.COLUMN_GATHERED: _install_column_gathered,
    Style.ROW: _install_row,
    Style.ROW_OF_WHOLE: _install_row,
    Style.VOCABULARY: _install_vocabulary,
    Style.EXPERTS_CUT: _install_experts,
    Style.EXPERTS_DEALT: _install_experts,
    Style.OWN_TENSORS: _install_nothing,
}
