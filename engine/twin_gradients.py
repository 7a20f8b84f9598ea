"""Gradients through a tiny twin: of one process, and of ranks, which must agree before a split model gives any.

The twin's logits are weighed with seeded numbers and differentiated with regard to every module's inputs and outputs
and every operation's, by plain autograd and the family's own attention. What ranks have of each gradient must make up
one process's. Where it does so at the embeddings' output and behind every layer, gradients through the model are right.
A place where it does not is refused by itself: tables of positions, which each rank uses for its own heads only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Arguments, Selector
from engine.experts import is_experts
from engine.grad_slices import gather_gradient
from engine.leaves import first_argument, port_leaves
from engine.links import Links
from engine.manners import use_attention
from engine.operations import watch_operations
from engine.slices import take_part
from engine.source_sites import Place, blocks_of_operation, pattern_of
from engine.writes import with_member
from polytrace.graph import Port
from polytrace.sources import split_operation

TOLERANCE = 1e-5  # of the largest gradient at a place, in float32
_SMALLEST = 0.1  # of the largest behind a layer: smaller gradients may be what rounding leaves of zero

TwinPlace = tuple[str, Port, Selector]  # a path of a module or an operation


@dataclass(slots=True)
class TwinGradients:
    """What one run showed, in the order of its forward; empty where the family's own forward has no gradients."""

    ports: dict[TwinPlace, Tensor | None] = field(default_factory=dict)
    operations: dict[TwinPlace, Tensor | None] = field(default_factory=dict)
    calls: dict[str, str] = field(default_factory=dict)  # operations that call a module -> its path

    def watch(self, seen: dict[TwinPlace, Tensor | None], path: str, port: Port, value: Any) -> None:
        """Waits for the gradients of what is at a port now."""
        for selector, tensor in port_leaves(value)[1].items():
            place = path, port, selector
            if tensor.requires_grad and place not in seen:
                seen[place] = None

                def keep(gradient: Tensor, place: TwinPlace = place) -> None:
                    seen[place] = gradient.detach().clone()

                tensor.register_hook(keep)


def run_backwards(model: Any, links: Links, tokens: Sequence[int], device: torch.device) -> TwinGradients:
    """One forward and backward of a twin; collective over the ranks that share it."""
    use_attention(model, "eager")
    found = TwinGradients()
    paths = {module: path for path, module in model.named_modules()}
    inside = tuple(f"{path}." for module, path in paths.items() if is_experts(module))
    modules = {path: module for module, path in paths.items() if not path.startswith(inside)}

    def entering(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.watch(found.ports, path, Port.INPUT, first_argument(args, kwargs))
            found.watch(found.ports, path, Port.INPUTS, Arguments(args, kwargs))

        return hook

    def leaving(path: str) -> Any:
        return lambda _module, _args, output: found.watch(found.ports, path, Port.OUTPUT, output)

    def telling(path: str, port: Port, value: Any, called: Any) -> None:
        if isinstance(called, nn.Module) and called in paths:
            found.calls[path] = paths[called]
        found.watch(found.operations, path, port, value)

    with ExitStack() as hooks, torch.enable_grad():
        for path, module in modules.items():
            hooks.callback(module.register_forward_hook(_beginning).remove)
            hooks.callback(module.register_forward_pre_hook(entering(path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leaving(path)).remove)
        hooks.enter_context(watch_operations(modules, telling))
        logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
        vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        weights = torch.randn(1, len(tokens), vocabulary, generator=torch.Generator().manual_seed(0)).to(device)
        own = weights if logits.shape[-1] == vocabulary else take_part(links, weights, 2)
        torch.autograd.backward(logits, own)
    return found


def _beginning(_module: nn.Module, _args: Any, output: Any) -> Any:
    """Weights have no gradients, so those of a pass end at the outputs of embeddings, and of tables of positions."""
    for selector, tensor in port_leaves(output)[1].items():
        if tensor.is_floating_point() and not tensor.requires_grad:
            output = with_member(output, selector, tensor.detach().requires_grad_().clone())  # some change it in place
    return output


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What ranks' gradients have in common with one process's."""

    worst: str  # of the embeddings' output and the layers': where the largest error is
    error: float  # there, of the largest gradient
    wrong: frozenset[Place]  # the way is "" of a module's port


def agree(
    whole: TwinGradients,
    local: TwinGradients,
    links: Links,
    packed: Mapping[str, int],
    modules: frozenset[str],
    residual: Sequence[str],
) -> Agreement:
    """Compares ranks' gradients with one process's; collective.

    `packed`: see `engine.splits.blocks_of`. `residual`: modules whose outputs are where the residual stream is whole.
    """
    compared: list[_Compared] = []
    for (path, port, selector), gradient in whole.ports.items():
        place = pattern_of(path), "", port, selector
        blocks = packed.get(path, 1) if port is Port.OUTPUT else 1
        compared.append(_Compared(path, place, gradient, local.ports.get((path, port, selector)), blocks))
    for (path, port, selector), gradient in whole.operations.items():
        split = split_operation(path, modules)
        assert split is not None, "operations are told below their modules"
        module, way = split
        place = pattern_of(module), way, port, selector
        blocks = blocks_of_operation(port, module, whole.calls.get(path), packed)
        compared.append(_Compared(path, place, gradient, local.operations.get((path, port, selector)), blocks))
    main = [one for one in compared if one.path in residual and one.place[1:3] == ("", Port.OUTPUT)]
    smallest = _SMALLEST * max((_largest(one.whole) for one in main if one.whole is not None), default=0.0)
    errors = dict(zip(compared, _errors(compared, smallest, links), strict=True))
    worst = max(main, key=lambda one: errors[one])
    return Agreement(
        worst=worst.path,
        error=errors[worst],
        wrong=frozenset(one.place for one, error in errors.items() if not error <= TOLERANCE),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Compared:
    path: str
    place: Place
    whole: Tensor | None
    local: Tensor | None
    blocks: int

    def way(self, ranks: int) -> int:
        """How a rank has the gradient: dimension and copies as one number, `_NOWHERE` where it does not lie so."""
        whole, local = self.whole, self.local
        if whole is None or local is None:
            return _IS_WHOLE if whole is local else _NOWHERE
        if local.ndim != whole.ndim:
            return _NOWHERE
        differing = [dim for dim in range(whole.ndim) if local.shape[dim] != whole.shape[dim]]
        if not differing:
            return _IS_WHOLE
        copies, rest = divmod(local.shape[differing[0]] * ranks, whole.shape[differing[0]])
        if len(differing) > 1 or rest or copies == 0 or ranks % copies:
            return _NOWHERE
        return (differing[0] + 1) * (ranks + 1) + copies

    def error(self, smallest: float, links: Links) -> float:
        """Of the largest gradient of the whole. Collective where ranks have parts."""
        if self.whole is None or self.local is None or self.whole.numel() == 0:
            return 0.0
        way, local = self.way(links.ranks), self.local
        if way != _IS_WHOLE:
            dim, copies = way // (links.ranks + 1) - 1, way % (links.ranks + 1)
            local = gather_gradient(links, local, dim, self.blocks, copies)
        scale = max(smallest, _largest(self.whole))
        difference = _largest(local - self.whole)
        if difference == 0:
            return 0.0
        return difference / scale if scale and math.isfinite(difference) else math.inf


_IS_WHOLE, _NOWHERE = 0, -1


def _errors(compared: Sequence[_Compared], smallest: float, links: Links) -> list[float]:
    # Ranks make the same collectives: what one of them does not have, or has in another shape, nobody joins.
    device = next(one.whole for one in compared if one.whole is not None).device
    ways = links.gather(torch.tensor([[one.way(links.ranks) for one in compared]], device=device), 0)
    can_join = ((ways == ways[0]) & (ways != _NOWHERE)).all(0).tolist()
    told = [one.error(smallest, links) if can else math.inf for one, can in zip(compared, can_join, strict=True)]
    worst: list[float] = links.gather(torch.tensor([told], device=device), 0).amax(0).tolist()
    return worst


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
