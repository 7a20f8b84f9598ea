"""The one experts function, registered with transformers: a row's bits do not depend on which rows share its experts.

Mixture-of-experts layers sort the rows of a stream by expert, so how many rows meet in one matrix product, and where
they lie in it, depends on the neighbours. Here every expert's rows are a *group* that begins and ends at a multiple of
`least_rows` rows, which is enough for a product's rows to keep their bits; all groups lie one after another in a buffer
whose size lets no element-wise kernel's tail fall on a row. What the chosen experts make of a row is added up in the
order in which its router named them.

On a GPU one kernel multiplies all groups, and nobody waits to learn how long they are (`engine.grouped`): the buffer is
as long as they can be at most.

Where experts are dealt out over tensor-parallel ranks, a rank computes those that it has; what a row chose elsewhere
gives it an exact zero here, and the ranks' answers are added up (`engine.parallel`).

Gradients keep to the same: what a row's experts give back is added up in its router's order, not in the order in which
rows lie in the buffer, and padding gives nothing.

On the meta device there are no groups to know: every row stands once for each of its experts.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from engine.differentiable import is_differentiated
from engine.kernels import has_kernels
from engine.lanes import least_rows, rows_multiple

# T = rows, K = experts of a row, S = T K, P = rows of all groups with their padding, J = tiles of these, D = hidden

NAME = "polytrace"


def use_padded_experts(model: PreTrainedModel) -> None:
    """Makes the experts of a model run by `padded_experts` from now on; nothing to do where there are none."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, padded_experts)
    model.set_experts_implementation(NAME)
    for module in model.modules():
        if _runs_own_loop(module):
            module.forward = partial(_with_padding, module, module.forward)


def is_experts(module: nn.Module) -> bool:
    """Whether a module runs its rows sorted by expert."""
    return hasattr(module, "_is_expert_parallel") or _runs_own_loop(module)


def _runs_own_loop(module: nn.Module) -> bool:
    kind: Any = type(module)
    return _has_own_loop(kind)


@cache
def _has_own_loop(kind: Any) -> bool:
    """Whether its forward takes what routers choose and is not one that transformers lets us replace."""
    taken = set(inspect.signature(kind.forward).parameters)
    return {"top_k_index", "top_k_weights"} <= taken and not hasattr(kind, "_apply_gate")


def deal_experts(module: nn.Module, rank: int, ranks: int) -> None:
    """From now on a module has its rank's share of the experts, and routers' choices still number all of them."""
    experts: Any = module
    experts.num_experts //= ranks
    experts.first_expert = rank * experts.num_experts


def padded_experts(experts: Any, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """`[T, D]`: the weighted sum of what the chosen experts make of each row. Called by transformers."""
    num_chosen = chosen_TK.shape[1]
    if hidden_TD.is_meta:
        groups = None
        into_S = torch.arange(chosen_TK.numel(), device="meta")
        rows_P = into_S // num_chosen
    else:
        groups, into_S, rows_P = _groups(experts, chosen_TK)
    placed_PD = _placed(hidden_TD, rows_P, into_S)
    product = _linear(experts, "gate_up_proj" if experts.has_gate else "up_proj", placed_PD, groups)
    product = experts._apply_gate(product) if experts.has_gate else experts.act_fn(product)
    product_PD = _linear(experts, "down_proj", product, groups)
    if experts.has_post_expert_norm:
        product_PD = experts.post_expert_norm(product_PD)
    product_TKD = _found(product_PD, into_S).view(*chosen_TK.shape, -1) * weights_TK.unsqueeze(-1)
    return _added_up(product_TKD).to(hidden_TD.dtype)


def _added_up(each_TKD: Tensor) -> Tensor:
    """`[T, D]`, in the router's order and in float32."""
    total_TD = each_TKD[:, 0].float()
    for place in range(1, each_TKD.shape[1]):
        total_TD = total_TD + each_TKD[:, place]
    return total_TD


def _placed(hidden_TD: Tensor, rows_P: Tensor, into_S: Tensor) -> Tensor:
    """`[P, D]`: the row of each place."""
    if not is_differentiated(hidden_TD):
        return hidden_TD[rows_P]
    placed_PD: Tensor = _Placed.apply(hidden_TD, rows_P, into_S)  # type: ignore[no-untyped-call]
    return placed_PD


def _found(product_PD: Tensor, into_S: Tensor) -> Tensor:
    """`[S, D]`: what is at the places of the rows' experts."""
    if not is_differentiated(product_PD):
        return product_PD[into_S]
    found_SD: Tensor = _Found.apply(product_PD, into_S)  # type: ignore[no-untyped-call]
    return found_SD


class _Placed(Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, rows_P: Tensor, into_S: Tensor) -> Tensor:
        ctx.num_rows = hidden_TD.shape[0]
        ctx.save_for_backward(into_S)
        return hidden_TD[rows_P]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_PD: Tensor) -> tuple[Tensor, None, None]:
        (into_S,) = ctx.saved_tensors
        each_TKD = gradient_PD[into_S].view(ctx.num_rows, -1, gradient_PD.shape[1])
        return _added_up(each_TKD).to(gradient_PD.dtype), None, None


class _Found(Function):
    @staticmethod
    def forward(ctx: Any, product_PD: Tensor, into_S: Tensor) -> Tensor:
        ctx.num_places = product_PD.shape[0]
        ctx.save_for_backward(into_S)
        return product_PD[into_S]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_SD: Tensor) -> tuple[Tensor, None]:
        (into_S,) = ctx.saved_tensors
        # Two rows meet at one place only where it is of no expert, and nothing goes further back.
        gradient_PD = gradient_SD.new_zeros(ctx.num_places, gradient_SD.shape[1])
        gradient_PD[into_S] = gradient_SD
        return gradient_PD, None


def _groups(experts: Any, chosen_TK: Tensor) -> tuple[list[int] | Tensor, Tensor, Tensor]:
    """The groups; `[S]` the place of each row's product; `[P]` the row of each place.

    The groups are the rows of each with its padding, or for the kernel `[J]`, the expert of each tile. Places of
    padding repeat row 0. Behind the last group there may be more of them, which belong to no expert.
    """
    num_experts, first = experts.num_experts, getattr(experts, "first_expert", None)
    ids_S = chosen_TK.flatten()
    if first is not None:  # those of other ranks are one more group, of which nothing is computed
        ids_S = ids_S - first
        ids_S = ids_S.masked_fill((ids_S < 0) | (ids_S >= num_experts), num_experts)
    used = ids_S.new_zeros(num_experts + (first is not None)).scatter_add_(0, ids_S, torch.ones_like(ids_S))
    least = least_rows(ids_S.device)
    sizes = (used + least - 1) // least * least
    order_S = ids_S.argsort(stable=True)
    firsts = sizes.cumsum(0) - sizes - (used.cumsum(0) - used)  # of each group, less the rows sorted before it
    into_S = torch.empty_like(ids_S)
    into_S[order_S] = torch.arange(len(ids_S), device=ids_S.device) + firsts[ids_S[order_S]]
    groups: list[int] | Tensor
    if has_kernels(ids_S.device) and _weight(experts).dtype in (torch.float32, torch.bfloat16, torch.float16):
        num_tiles = len(ids_S) // least + min(len(ids_S), len(sizes))
        first_J = torch.arange(num_tiles, device=ids_S.device) * least
        groups = torch.searchsorted(sizes.cumsum(0), first_J, right=True)
        rows_P = ids_S.new_zeros(num_tiles * least)
    else:
        groups = sizes[:num_experts].tolist()
        num_places = sum(groups)
        if first is not None:
            into_S.masked_fill_(ids_S == num_experts, num_places)  # behind the last group, where products are zero
            num_places += 1
        multiple = _buffer_multiple(experts)
        rows_P = ids_S.new_zeros(-(-num_places // multiple) * multiple)
    rows_P[into_S] = torch.arange(len(ids_S), device=ids_S.device) // chosen_TK.shape[1]
    return groups, into_S, rows_P


def _buffer_multiple(experts: Any) -> int:
    """Rows of which the buffer is a multiple, for the widths of what is computed in it."""
    weight = _weight(experts)
    width = weight.shape[2 if experts.is_transposed else 1]
    widths = {width, width // 2} if experts.has_gate else {width}
    return math.lcm(least_rows(weight.device), rows_multiple(widths, torch.get_num_threads(), weight.device))


def _weight(experts: Any) -> Tensor:
    """The first matrices of all experts."""
    weight: Tensor = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return weight


def _linear(experts: Any, name: str, x_PI: Tensor, groups: list[int] | Tensor | None) -> Tensor:
    """Each group times its own expert's matrix, `[P, out]`; zeros behind the last group. Of no group: shapes only."""
    weights = getattr(experts, name)
    biases = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if not experts.is_transposed:
        weights = weights.transpose(1, 2)
    if groups is None:
        product: Tensor = x_PI @ weights[0]
        return product
    if isinstance(groups, Tensor):
        from engine.grouped import grouped_product  # imports Triton

        return grouped_product(x_PI, weights, biases, groups)
    parts = []
    start = 0
    for expert, count in enumerate(groups):
        if count:
            product = x_PI[start : start + count] @ weights[expert]
            parts.append(product if biases is None else product + biases[expert])
            start += count
    parts.append(x_PI.new_zeros(x_PI.shape[0] - start, weights.shape[2]))
    return torch.cat(parts)


def _with_padding(
    experts: Any, forward: Callable[..., Tensor], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """A loop over experts of the model's own, `[1, T, D]` or `[T, D]`, with rows of zeros behind, as many for each
    expert as keep its rows' bits from how many they are.
    """
    if hidden.is_meta:
        return torch.empty_like(hidden)
    dim = hidden.ndim - 2
    least = least_rows(hidden.device)
    padding = torch.arange(experts.num_experts, device=hidden.device).repeat_interleave(least)
    shape = list(hidden.shape)
    shape[dim] = len(padding)
    chosen = torch.cat([top_k_index, padding[:, None].expand(-1, top_k_index.shape[1])])
    weights = torch.cat([top_k_weights, top_k_weights.new_zeros(len(padding), top_k_weights.shape[1])])
    total = forward(torch.cat([hidden, hidden.new_zeros(shape)], dim), chosen, weights)
    return total.narrow(dim, 0, hidden.shape[dim])
