"""Modules of the model that a graph calls on its own values, and their gradients.

The module's visits do not fire. Where ranks split the module, each runs its part on its part of the argument, and what
comes of it is put together; gradients take the same way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from engine.grad_slices import take_gradient
from engine.op_grads import gradient_through
from engine.ops import resolve
from engine.slices import gather_whole, take_part
from polytrace.graph import Call, NodeId, Ref
from scheduling.below import split_input, split_output

if TYPE_CHECKING:
    from engine.fragments import ShardContext


class ModuleCall:
    """One call on one rank."""

    def __init__(self, context: ShardContext, node: Call) -> None:
        self._context = context
        self.module = context.runner.model.get_submodule(node.module)
        links, table = context.links, context.table
        is_split = links.ranks > 1
        self.given = split_output(node.module, table) if is_split else None  # blocks and copies of what it returns
        taken = split_input(node.module, table) if is_split and len(node.args) == 1 else None
        is_taken = taken is not None and split_output(node.module, table) is None and _is_matrix(self.module)
        self._taken = taken if is_taken else None  # blocks of its argument, of which a rank takes its part

    def run(self, args: Sequence[Any]) -> Any:
        """What this rank has of the value."""
        if isinstance(self.module, nn.Embedding):
            _check_ids(self.module, args)
        with torch.no_grad():
            own = [self._own(arg) for arg in args]
            return self._called(own)

    def joined(self, value: Any) -> Any:
        """The whole of what ranks have."""
        if self.given is None:
            return value
        return gather_whole(self._context.links, value, value.ndim - 1, *self.given)

    def gradient(self, node: Call, of: NodeId, values: Mapping[NodeId, Any], given: Sequence[Tensor | None]) -> Tensor:
        """With regard to the argument that is the value `of`, from those with regard to the results. Collective."""
        links = self._context.links
        leaf = self._own(values[of].detach()).requires_grad_()
        with torch.enable_grad():
            own = leaf.view_as(leaf)
            args = [own if operand == Ref(of) else self._own(resolve(operand, values)) for operand in node.args]
            results = self._called(args)
        if self.given is not None:
            blocks, copies = self.given
            given = [None if one is None else take_gradient(links, one, one.ndim - 1, blocks, copies) for one in given]
        found = gradient_through(leaf, results, given)
        return found if self._taken is None else gather_whole(links, found, found.ndim - 1, self._taken)

    def _called(self, args: Sequence[Any]) -> Any:
        with self._context.runner.calling():
            given = self.module(*args)
        home = self._context.device  # another than the module's, where a model's parts lie on several
        return tree_map(lambda part: part.to(home) if isinstance(part, Tensor) else part, given)

    def _own(self, arg: Any) -> Any:
        """What of an argument meets this rank's weights."""
        if self._taken is None:
            return arg
        return take_part(self._context.links, arg, arg.ndim - 1, self._taken)


def _check_ids(module: nn.Embedding, args: Sequence[Any]) -> None:
    """An id out of range must fail its request here: on a GPU it would take the whole shard down."""
    for ids in args:
        if (
            isinstance(ids, Tensor)
            and ids.numel()
            and not 0 <= int(ids.min()) <= int(ids.max()) < module.num_embeddings
        ):
            raise IndexError(
                f"ids from {int(ids.min())} to {int(ids.max())}, the embedding has {module.num_embeddings}"
            )


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module's own weights meet its input's features."""
    return any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())
