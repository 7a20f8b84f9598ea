"""Runs one stage's window of the unmodified model over packed rows, and stops at the sites that somebody visits.

Owns the hooks. Around one forward it puts received hidden states in at the first layer of the window, hands every
visited port to its callback in the model's order, takes hidden states out behind the last layer and stops as soon as
the last needed visit is done. Behind every layer it brings the hidden states to the rows of the next level, and before
every layer what else depends on tokens and positions (rotary tables, per-layer inputs). Knows nothing of requests:
`engine.shard` and `engine.gate` bring the callbacks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from engine.arguments import Arguments, Selector
from engine.around import Around, rows_of
from engine.attention import AttentionPass, attending
from engine.copies import to_device
from engine.head_outputs import HeadOutputs, with_change
from engine.head_seam import HeadSeam
from engine.image_positions import put_in
from engine.imaged import plain_tokens
from engine.leaves import first_argument, port_leaves
from engine.named import CallView, HeadsTaken, HeadView, Views
from engine.operations import Stops, rewritten
from engine.pair_tensors import TensorPairs
from engine.points import MASKED, Point, Points
from engine.positions import numbered_modules, numbering
from engine.reruns import Rerun
from engine.streams import Streams
from engine.tape import Tape
from engine.trunks import Trunks
from engine.windows import Window
from engine.writes import with_member
from polytrace.graph import Port

if TYPE_CHECKING:
    from engine.image_rows import SeenImages

# T = packed rows of a level, K = kept rows, D = hidden

# Gets a port's value in the forward and returns what the port hands on: the same object when nothing was replaced.
Visitor = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One port to stop at."""

    order: int
    module: str
    port: Port
    visitor: Visitor
    operation: str = ""  # the way to a call inside of the module's forward, "" the module itself
    rows: Collection[int] = ()  # of the stream, at a point of pairs: those that are read or written
    layouts: Mapping[Selector, int] = field(default_factory=dict)  # of tensors whose rows are not in dimension 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """The stream of one pass on the device."""

    streams: Streams
    attention: AttentionPass
    trunks: Trunks
    landing: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)  # see `StageRunner.run`
    tape: Tape | None = None  # that records the forward; None: nobody runs it back
    images: SeenImages | None = None  # that stand in its prompts

    def recording(self) -> AbstractContextManager[None]:
        """Forwards inside are recorded, when somebody runs them back; else they run without autograd."""
        return torch.no_grad() if self.tape is None else self.tape.recording()


class StageRunner:
    """The window of one shard."""

    def __init__(self, model: PreTrainedModel, window: Window, *, keeps_rows: bool, views: Views | None = None) -> None:
        """`views` are the points that are seen in other modules' values."""
        self.model = model
        self.window = window
        self._keeps_rows = keeps_rows  # whether the head can run on chosen rows
        self._layers: Any = model.get_submodule(window.layers)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._views: Views = views or {}
        self._numbered = numbered_modules(model)
        self._is_calling = False

    def run(
        self, rows: PackedRows, hidden_1TD: Tensor | None, visits: list[Visit], *, stop_after: int | None
    ) -> Tensor | None:
        """One forward of the window.

        `rows.landing` has, by level, what visitors of a layer's output left to be done to the hidden states of the next
        level, whose rows are not there at their visit. `hidden_1TD` enters at the first layer (None on the first
        stage). `stop_after` is the order of the visit to stop behind, None to go to the window's end. Returns the
        hidden states behind the last layer when there is a next stage and the forward got there, else None. Whatever
        the model raises comes through.
        """
        left: list[Tensor] = []
        streams = rows.streams
        tokens, features = streams.tokens(), None
        if rows.images is not None and self.window.is_first:
            features = rows.images.features(self.model, tokens)
        tokens_1T, positions_1T = (
            to_device([numbers], streams.device) for numbers in (plain_tokens(self.model, tokens), streams.positions())
        )
        kept_K = streams.kept_rows() if self.window.is_last and self._keeps_rows else None
        options: dict[str, Any] = {} if kept_K is None else {"logits_to_keep": kept_K}
        with ExitStack() as hooks, attending(rows.attention), rows.recording():
            if features is not None:
                hooks.callback(features.scattered(self.model).remove)
            for handle in self._install(rows, hidden_1TD, visits, stop_after, left):
                hooks.callback(handle.remove)
            if rows.images is not None and (seen_31T := rows.images.positions(self.model, streams)) is not None:
                hooks.callback(put_in(self.model, seen_31T).remove)  # behind who looks at what the text model is given
            hooks.enter_context(self._numbering(positions_1T))
            reruns = [self._rerun(rows, level, positions_1T) for level in self._rerun_layers(rows, visits)]
            hooks.enter_context(self._rewritten(reruns, visits, stop_after))
            with suppress(Done):
                self.model(input_ids=tokens_1T, position_ids=positions_1T, use_cache=False, **options)
        return left[0] if left else None

    @contextmanager
    def _numbering(self, positions_1T: Tensor) -> Iterator[None]:
        """Modules inside that number tokens get their positions."""
        with ExitStack() as hooks:
            for module, give in numbering(self._numbered, positions_1T):
                own = self._unless_calling(give)
                hooks.callback(module.register_forward_pre_hook(own, with_kwargs=True).remove)
            yield

    @contextmanager
    def _rewritten(self, reruns: list[Rerun], visits: list[Visit], stop_after: int | None) -> Iterator[None]:
        """Forwards inside stop at their operations, and some layers keep only what comes in."""
        with ExitStack() as stack:
            for rerun in reruns:
                stack.enter_context(rerun.plain())
            stack.enter_context(self._operations(visits, stop_after))
            for rerun in reruns:
                stack.enter_context(rerun.installed())
            yield

    def _rerun_layers(self, rows: PackedRows, visits: list[Visit]) -> Iterator[int]:
        """Layers of the window that run again on the way back. Where scores are seen, rows attend another way."""
        if rows.tape is None or not rows.tape.reruns:
            return
        seen = [visit.module for visit in visits if visit.port.is_of_pairs]
        for level in range(self.window.first, self.window.stop):
            path = f"{self.window.layers}.{level}."
            if level in rows.tape.reruns and not any(module.startswith(path) for module in seen):
                yield level

    def _rerun(self, rows: PackedRows, level: int, positions_1T: Tensor) -> Rerun:
        @contextmanager
        def again() -> Iterator[None]:
            own = AttentionPass(rows.attention.pass_id, rows.attention.store, rows.attention.device)
            own.is_taped = True
            own.enter(level, rows.streams.inside(level))
            with attending(own), self._numbering(positions_1T):
                yield

        return Rerun(self._layers[level], lambda: again)

    def _first_position(self) -> int:
        """Of the sequence that runs, where each runs alone."""
        return 0

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Modules called inside are run on a request's own value: their visits do not fire."""
        self._is_calling = True
        try:
            yield
        finally:
            self._is_calling = False

    def _install(
        self,
        rows: PackedRows,
        hidden_1TD: Tensor | None,
        visits: list[Visit],
        stop_after: int | None,
        left: list[Tensor],
    ) -> Iterator[RemovableHandle]:
        if hidden_1TD is not None:
            entry: nn.Module = self._layers[self.window.first]
            yield entry.register_forward_pre_hook(putting_in(hidden_1TD), with_kwargs=True)
        owned = range(self.window.first, self.window.stop)
        pre_hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
        for level in owned:
            layer: nn.Module = self._layers[level]
            yield layer.register_forward_pre_hook(self._entering(rows, level), with_kwargs=True)
            way = rows.streams.ways_around(level)
            if way is not None:  # behind what visits the layer's input, and before what visits its output
                around = Around(*way)
                pre_hooks.append((layer, self._unless_calling(around.leave)))
                yield layer.register_forward_hook(self._unless_calling(around.join))
        yield from self._visiting(visits, stop_after, rows.attention.points)
        for layer, leave in pre_hooks:
            yield layer.register_forward_pre_hook(leave, with_kwargs=True)
        for level in owned:
            following: nn.Module = self._layers[level]
            yield following.register_forward_hook(self._crossing(rows, level + 1))
        if not self.window.is_last:
            exit_layer: nn.Module = self._layers[self.window.stop - 1]
            yield exit_layer.register_forward_hook(taking_out(left))

    def _visiting(
        self, visits: list[Visit], stop_after: int | None, points: dict[int, Points]
    ) -> Iterator[RemovableHandle]:
        """Hooks for visits of modules' ports; those inside of attention go into `points`."""
        for visit in sorted(visits, key=lambda visit: visit.order):
            module = self._modules[visit.module]
            is_last = visit.order == stop_after
            view = self._views.get((visit.module, visit.port))
            if visit.operation or isinstance(view, CallView):
                continue
            if isinstance(view, HeadsTaken):
                yield self._visiting_heads(visit, view, is_last)
            elif view is not None:
                yield from self._visiting_view(visit, view, is_last)
            elif visit.port.is_inner:
                point = Point(visit=_visiting_point(visit, is_last), rows=visit.rows)
                points.setdefault(id(module), {})[visit.port] = point
            elif visit.port is Port.TOKEN:  # behind all other visits of what the root returns
                yield module.register_forward_hook(self._visiting_output(visit, is_last))
            elif visit.port is Port.INPUT:
                yield module.register_forward_pre_hook(self._visiting_input(visit, is_last), with_kwargs=True)
            elif visit.port is Port.INPUTS:
                yield module.register_forward_pre_hook(self._visiting_inputs(visit, is_last), with_kwargs=True)
            else:
                yield module.register_forward_hook(self._visiting_output(visit, is_last))

    @contextmanager
    def _operations(self, visits: list[Visit], stop_after: int | None) -> Iterator[None]:
        """Forwards inside stop at the operations that somebody visits."""
        with ExitStack() as stack:
            for module, stops in self._stops(visits, stop_after).items():
                stack.enter_context(rewritten(module, stops.hook()))
            yield

    def _stops(self, visits: list[Visit], stop_after: int | None) -> dict[nn.Module, Stops]:
        """The operations to stop at, by the module whose forward has them."""
        found: dict[nn.Module, Stops] = {}
        for visit in visits:
            view = None if visit.operation else self._views.get((visit.module, visit.port))
            if isinstance(view, CallView):
                stops = found.setdefault(self.model.get_submodule(view.module), Stops())
                stops.add(view.way, view.port, self._visiting_pairs(visit, view, visit.order == stop_after))
            elif visit.operation:
                stops = found.setdefault(self.model.get_submodule(visit.module), Stops())
                stops.add(visit.operation, visit.port, self._visiting_operation(visit, visit.order == stop_after))
        return found

    def _entering(self, rows: PackedRows, level: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_calling:
                return None
            streams = rows.streams
            rows.attention.enter(level, streams.inside(level))
            if rows.tape is not None:
                entering = rows.tape.enter(first_argument(args, kwargs))
                args, kwargs = replace_first_argument(args, kwargs, entering)
            origins = streams.origins(level)
            if origins is None:
                return None if rows.tape is None else (args, kwargs)
            num_rows = streams.num_root_rows
            hidden = first_argument(args, kwargs)
            taken = rows_of(args, origins, num_rows), rows_of(kwargs, origins, num_rows)
            is_root = level == 0 and hidden.shape[1] == num_rows  # the embeddings: cut to the rows of level 0
            return taken if is_root else replace_first_argument(*taken, hidden)

        return hook

    def _unless_calling(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *call: None if self._is_calling else hook(*call)

    def _crossing(self, rows: PackedRows, level: int) -> Callable[..., Any]:
        """Behind a layer: the rows of the next level, and what was written to them."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self._is_calling:
                return None
            hidden = output if isinstance(output, Tensor) else output[0]
            rows.trunks.keep_outputs(level - 1, hidden)
            births = rows.streams.births(level)
            after = hidden if births is None else rows.trunks.take(level - 1, hidden, births)
            for land in rows.landing.pop(level, ()):
                after = land(after)
            if after is hidden:
                return None
            return after if isinstance(output, Tensor) else (after, *output[1:])

        return hook

    def _visiting_input(self, visit: Visit, is_last: bool) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_calling:
                return None
            before = first_argument(args, kwargs)
            after = visit.visitor(before)
            if is_last:
                raise Done
            return None if after is before else replace_first_argument(args, kwargs, after)

        return hook

    def _visiting_operation(self, visit: Visit, is_last: bool) -> Visitor:
        def stop(before: Any) -> Any:
            if self._is_calling:
                return before
            after = visit.visitor(before)
            if is_last:
                raise Done
            return after

        return stop

    def _visiting_inputs(self, visit: Visit, is_last: bool) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_calling:
                return None
            before = Arguments(args, kwargs)
            after = visit.visitor(before)
            if is_last:
                raise Done
            return None if after is before else (after.args, dict(after.kwargs))

        return hook

    def _visiting_pairs(self, visit: Visit, view: CallView, is_last: bool) -> Visitor:
        """Scores or patterns between two calls."""

        def stop(before: Any) -> Any:
            if self._is_calling:
                return before
            tensor = port_leaves(before)[1][view.selector]
            pairs = TensorPairs(tensor, MASKED[visit.port], self._first_position())
            visit.visitor(pairs)
            if is_last:
                raise Done
            return before if pairs.tensor is tensor else with_member(before, view.selector, pairs.tensor)

        return stop

    def _visiting_heads(self, visit: Visit, view: HeadsTaken, is_last: bool) -> RemovableHandle:
        """Heads' results in the input of their projection."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._is_calling:
                return None
            before: Tensor = first_argument(args, kwargs).unflatten(-1, (view.num_heads, -1))
            after: Tensor = visit.visitor(before)
            if is_last:
                raise Done
            return None if after is before else replace_first_argument(args, kwargs, after.flatten(-2))

        return self.model.get_submodule(view.module).register_forward_pre_hook(hook, with_kwargs=True)

    def _visiting_view(self, visit: Visit, view: HeadView, is_last: bool) -> Iterator[RemovableHandle]:
        """A point that is a part of another module's output, or made of its input."""
        source: Any = self.model.get_submodule(view.module)
        units = view.units
        adds_changes = hasattr(source, "adds_changes")  # modules of several ranks do, before they add up
        changes: dict[int, tuple[Tensor, Tensor] | None] = {}  # by thread: of lanes, see `engine.lockstep`
        seams: dict[int, HeadSeam] = {}  # by thread

        def part(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._is_calling:
                return None
            before = units.of(output, -1)
            after = visit.visitor(before)
            if is_last:
                raise Done
            if after is before:
                if not units.is_view and not output.requires_grad:
                    units.put(output, before)
                return None
            changed = output.clone()
            units.put(changed, after)
            return changed

        def made(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor] | None:
            weight = source.weight if view.is_transposed else source.weight.T  # [H C, D]
            z = source.own_input(args[0]) if hasattr(source, "own_input") else args[0]
            heads = HeadOutputs(z.unflatten(-1, (-1, units.size)), weight.unflatten(0, (-1, units.size)))
            if self._is_calling or heads.z.shape[2] != heads.weight.shape[0]:
                return None
            visit.visitor(heads)
            if is_last:
                raise Done
            if heads.seam is not None:
                seams[get_ident()] = heads.seam
            if adds_changes:
                source.change = heads.change
            else:
                changes[get_ident()] = heads.change
            return None if heads.seam is None else (args[0].detach(),)

        def closed(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            seam = seams.pop(get_ident(), None)
            return None if seam is None else seam.close(output)

        def with_its_change(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            change = changes.pop(get_ident(), None)
            return None if change is None else with_change(output, change)

        if visit.port is not Port.HEAD_OUT:
            yield source.register_forward_hook(part)
            return
        yield source.register_forward_pre_hook(made)
        if adds_changes:
            yield _Forgetting(source)  # a pass may end before the module has run
        else:
            yield source.register_forward_hook(with_its_change)
        yield source.register_forward_hook(closed)

    def _visiting_output(self, visit: Visit, is_last: bool) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
            if self._is_calling:
                return None
            after = visit.visitor(output)
            if is_last:
                raise Done
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


class _Forgetting(RemovableHandle):
    """Lets go, with the hooks, of what a module was to add."""

    def __init__(self, source: Any) -> None:
        super().__init__(OrderedDict())
        self._source = source

    def remove(self) -> None:
        self._source.change = None


class Done(Exception):
    """Ends a forward early: not an error, there is nothing left to do."""


def _visiting_point(visit: Visit, is_last: bool) -> Visitor:
    def point(value: Any) -> Any:
        after = visit.visitor(value)
        if is_last:
            raise Done
        return after

    return point


def putting_in(hidden_1TD: Tensor) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return replace_first_argument(args, kwargs, hidden_1TD)

    return hook


def taking_out(left: list[Tensor]) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        left.append(output if isinstance(output, Tensor) else output[0])
        raise Done

    return hook
