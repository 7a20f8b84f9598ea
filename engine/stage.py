"""Runs one stage's window of the unmodified model over packed rows, and stops at the sites that somebody visits.

Owns the hooks. Around one forward it puts received hidden states in at the first layer of the window, hands every
visited port to its callback in the model's order, takes hidden states out behind the last layer and stops as soon as
the last needed visit is done. Knows nothing of requests: `engine.shard` and `engine.gate` bring the callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from engine.attention import AttentionPass, attending
from engine.sites import first_argument
from engine.windows import Window
from polytrace.graph import Port

# T = packed rows, K = kept rows, D = hidden

# Gets a port's value in the forward and returns what the port hands on: the same object when nothing was replaced.
Visitor = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One port to stop at."""

    order: int
    module: str
    port: Port
    visitor: Visitor


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """The stream of one pass on the device."""

    tokens_1T: Tensor
    positions_1T: Tensor
    kept_K: Tensor | None  # None: the head takes all rows
    attention: AttentionPass


class StageRunner:
    """The window of one shard."""

    def __init__(self, model: PreTrainedModel, window: Window) -> None:
        self.model = model
        self.window = window
        self._layers: Any = model.get_submodule(window.layers)
        self._is_calling = False

    def run(
        self, rows: PackedRows, hidden_1TD: Tensor | None, visits: list[Visit], *, stop_after: int | None
    ) -> Tensor | None:
        """One forward of the window.

        `hidden_1TD` enters at the first layer (None on the first stage). `stop_after` is the order of the visit to stop
        behind, None to go to the window's end. Returns the hidden states behind the last layer when there is a next
        stage and the forward got there, else None. Whatever the model raises comes through.
        """
        left: list[Tensor] = []
        options: dict[str, Any] = {} if rows.kept_K is None else {"logits_to_keep": rows.kept_K}
        with ExitStack() as hooks, attending(rows.attention), torch.no_grad():
            for handle in self._install(hidden_1TD, visits, stop_after, left):
                hooks.callback(handle.remove)
            with suppress(_Done):
                self.model(input_ids=rows.tokens_1T, position_ids=rows.positions_1T, use_cache=False, **options)
        return left[0] if left else None

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Modules called inside are run on a request's own value: their visits do not fire."""
        self._is_calling = True
        try:
            yield
        finally:
            self._is_calling = False

    def _install(
        self, hidden_1TD: Tensor | None, visits: list[Visit], stop_after: int | None, left: list[Tensor]
    ) -> Iterator[RemovableHandle]:
        if hidden_1TD is not None:
            entry: nn.Module = self._layers[self.window.first]
            yield entry.register_forward_pre_hook(_putting_in(hidden_1TD), with_kwargs=True)
        for visit in sorted(visits, key=lambda visit: visit.order):
            module = self.model.get_submodule(visit.module)
            is_last = visit.order == stop_after
            if visit.port is Port.INPUT:
                yield module.register_forward_pre_hook(self._visiting_input(visit, is_last), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._visiting_output(visit, is_last))
        if not self.window.is_last:
            exit_layer: nn.Module = self._layers[self.window.stop - 1]
            yield exit_layer.register_forward_hook(_taking_out(left))

    def _visiting_input(self, visit: Visit, is_last: bool) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_calling:
                return None
            before = first_argument(args, kwargs)
            after = visit.visitor(before)
            if is_last:
                raise _Done
            return None if after is before else replace_first_argument(args, kwargs, after)

        return hook

    def _visiting_output(self, visit: Visit, is_last: bool) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self._is_calling:
                return None
            after = visit.visitor(output)
            if is_last:
                raise _Done
            return None if after is output else after

        return hook


def replace_first_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the `input` port's value replaced."""
    if args:
        return (value, *args[1:]), dict(kwargs)
    first = next(iter(kwargs))
    return args, {**kwargs, first: value}


class _Done(Exception):
    """Ends a forward early: not an error, there is nothing left to do."""


def _putting_in(hidden_1TD: Tensor) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first_argument(args, kwargs, hidden_1TD)

    return hook


def _taking_out(left: list[Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        left.append(output if isinstance(output, Tensor) else output[0])
        raise _Done

    return hook
