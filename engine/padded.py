"""Runs one stage's window for models whose rows cannot share a stream: each sequence alone, all of them in step.

In the padded layout every sequence of a pass runs the unmodified model as a batch of one, with its own tokens and
nothing else, so it cannot matter what runs beside it. At a port that somebody visits all sequences stop; there their
values lie side by side as the stream `[1, T, ...]` of the plan, for the same visitors that a packed pass has, and each
goes on with its own part. Rows are never shared and never end early.

A sequence that generates runs with a cache that the model makes itself (`engine.own_caches`): its first pass fills it
with the prompt, and each later pass, of one token, goes on from it. Where that gives other numbers than the model has
without one, all of the sequence runs again (`engine.again`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.again import RunsAgain
from engine.attention import AttentionPass, attending
from engine.continuing import EarlierKeys, new_cache
from engine.copies import to_device
from engine.encoders import beginning, has_encoder, of_decoder
from engine.leaves import first_argument
from engine.lockstep import in_step, stop
from engine.own_caches import OwnCache
from engine.points import Points
from engine.reruns import Rerun
from engine.side_by_side import SideBySide
from engine.spans import SpanStore
from engine.stage import Done, PackedRows, StageRunner, Visit, putting_in, replace_first_argument, taking_out
from engine.streams import Streams
from engine.tape import Tape
from scheduling.plan import Plan, Segment

# T = rows of all sequences, L = tokens of one, D = hidden


@dataclass(slots=True, kw_only=True)
class _Run:
    """One sequence in one pass."""

    tokens: tuple[int, ...]  # that run
    num_new: int  # of these, the last ones, whose rows the pass has
    streams: Streams  # of it alone
    attention: AttentionPass
    cache: OwnCache | RunsAgain | None  # None: it does not go on
    begin: int  # position of its first token here
    hidden_1LD: Tensor | None  # that enters at the first layer of a later stage
    recording: Callable[[], AbstractContextManager[None]]  # as of `PackedRows`
    left: list[Tensor] = field(default_factory=list)  # behind the last layer of a stage that is not the last


_running: ContextVar[_Run | None] = ContextVar("padded_run", default=None)


class PaddedRunner(StageRunner):
    """The window of one shard."""

    runs_again = False  # sequences that go on, all of their tokens at every step

    def run(
        self, rows: PackedRows, hidden_1TD: Tensor | None, visits: list[Visit], *, stop_after: int | None
    ) -> Tensor | None:
        """One forward of the window for each sequence. As `StageRunner.run`."""
        plan = rows.streams.plan
        running = list(rows.streams.running)
        lengths = [len(plan.segments[place].tokens) for place in running]

        def meet(visit: Visit, values: list[Any]) -> list[Any]:
            with torch.no_grad():
                together = SideBySide(values, lengths, visit.layouts)
            if rows.tape is not None:
                found: list[Any] = visit.visitor(together)
                return found
            return together.apart(_landed(visit.visitor(together.value), rows))

        points: dict[int, Points] = {}
        is_one = len(running) == 1
        go = partial(_alone, rows=rows) if is_one else _stop_at
        caches = {place: self._cache_of(place, rows) for place in running}
        again = [visit for cache in caches.values() if isinstance(cache, RunsAgain) for visit in cache.visits(visits)]
        stopping = [
            *(replace(visit, visitor=_new_rows(visit, go(visit))) for visit in visits),
            *(replace(visit, visitor=_new_rows(visit, _unchanged)) for visit in _distinct(again)),
        ]
        with ExitStack() as hooks, rows.recording():
            following = self._following(rows.tape)
            for handle in (self._taking(), *self._visiting(stopping, stop_after, points), *following):
                hooks.callback(handle.remove)
            reruns = [self._rerun_alone(level) for level in self._rerun_layers(rows, visits)]
            hooks.enter_context(self._rewritten(reruns, stopping, stop_after))
            runs = [
                self._run_of(place, rows, caches[place], points, part)
                for place, part in zip(running, _parts(hidden_1TD, lengths), strict=True)
            ]
            if is_one:
                self._forward(runs[0])
            else:
                threads = torch.get_num_threads()
                in_step([partial(self._in_lane, run, threads) for run in runs], meet)
        self._keep(rows, dict(zip(running, runs, strict=True)))
        left = [part for run in runs for part in run.left]
        return torch.cat(left, 1) if left else None

    def _run_of(
        self,
        place: int,
        rows: PackedRows,
        cache: OwnCache | RunsAgain | None,
        points: dict[int, Points],
        hidden_1LD: Tensor | None,
    ) -> _Run:
        plan = rows.streams.plan
        segment, num_new = plan.segments[place], len(plan.segments[place].tokens)
        earlier = _earlier(plan, place)
        if isinstance(cache, RunsAgain):
            cache.num_new = num_new
            segment, earlier = _whole(segment, cache.tokens), None
        own = replace(segment, parent=None if earlier is None else 0)
        both = (own,) if earlier is None else (earlier, own)
        alone = replace(plan, segments=both, keeps=(), grows=())
        streams = Streams(alone, 1, rows.streams.device, is_fixed=False)
        store = SpanStore(rows.attention.store.budget_bytes)
        trunks = None if earlier is None else EarlierKeys(streams, store)
        attention = AttentionPass(rows.attention.pass_id, store, rows.streams.device, trunks)
        attention.is_taped = rows.tape is not None
        attention.has_own_cache = isinstance(cache, OwnCache)
        every = range(len(segment.tokens))  # patterns are held of all rows, so that all sequences stop there
        attention.points = {
            module: {port: replace(point, rows=every if port.is_of_pairs else ()) for port, point in own_points.items()}
            for module, own_points in points.items()
        }
        return _Run(
            tokens=segment.tokens,
            num_new=num_new,
            streams=streams,
            attention=attention,
            cache=cache,
            begin=segment.starts[0],
            hidden_1LD=hidden_1LD,
            recording=rows.recording,
        )

    def _rerun_alone(self, level: int) -> Rerun:
        def of_run() -> Callable[[], AbstractContextManager[None]]:
            run = _running.get()
            assert run is not None, "a layer runs for a sequence"

            @contextmanager
            def again() -> Iterator[None]:
                own = AttentionPass(run.attention.pass_id, run.attention.store, run.attention.device)
                own.is_taped = True
                own.enter(level, run.streams.layer(level))
                with attending(own):
                    yield

            return again

        return Rerun(self._layers[level], of_run)

    def _cache_of(self, place: int, rows: PackedRows) -> OwnCache | RunsAgain | None:
        """With what a sequence runs: None when it does not go on behind this pass."""
        plan, caches = rows.streams.plan, rows.attention.store.own_caches
        grows = [grow for grow in plan.grows if grow.segment == place]
        earlier = _earlier(plan, place)
        if earlier is None and grows:
            return RunsAgain() if self.runs_again else new_cache(self.model)
        if earlier is None:
            return None
        assert earlier.trunk is not None, "in the padded layout a sequence goes on from its own cache alone"
        cache = caches.of(earlier.trunk)
        assert isinstance(cache, (OwnCache, RunsAgain))
        assert cache.length == plan.segments[place].starts[0], "a cache has the tokens before"
        is_taken = [grow.trunk for grow in grows] == [earlier.trunk]
        return cache if is_taken else cache.fork()  # another's, or a later wave runs the row again

    def _keep(self, rows: PackedRows, runs: dict[int, _Run]) -> None:
        """Caches that later passes go on from."""
        for run in runs.values():
            if isinstance(run.cache, OwnCache):
                run.cache.grow(run.num_new, self.window, rows.streams.device)
            elif run.cache is not None:
                run.cache.grow(run.tokens[-run.num_new :])
        taken: set[int] = set()
        for grow in rows.streams.plan.grows:
            cache = runs[grow.segment].cache
            assert cache is not None, "it goes on"
            if grow.stop < cache.length:
                continue  # what several sequences have in common: here each has all of it
            rows.attention.store.own_caches.keep(grow.trunk, cache.fork() if grow.segment in taken else cache)
            taken.add(grow.segment)

    def _taking(self) -> RemovableHandle:
        """Caches that come with the root's output."""

        def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            run = _running.get()
            if run is not None and isinstance(run.cache, OwnCache) and not self._is_calling:
                run.cache.take(output)

        return self.model.register_forward_hook(hook)

    def _first_position(self) -> int:
        run = _running.get()
        return 0 if run is None else run.begin

    def _in_lane(self, run: _Run, threads: int) -> None:
        """What torch keeps for each thread, and then the forward."""
        torch.set_num_threads(threads)
        device = run.streams.device
        with ExitStack() as own:
            if device.type == "cuda":
                own.enter_context(torch.cuda.device(device))
            own.enter_context(run.recording())
            self._forward(run)

    def _forward(self, run: _Run) -> None:
        tokens_1L = to_device([list(run.tokens)], run.streams.device)
        with _current(run), attending(run.attention), suppress(Done):
            self.model(**self._arguments(run, tokens_1L))

    def _arguments(self, run: _Run, tokens_1L: Tensor) -> dict[str, Any]:
        """What the root's forward gets, the sequence's tokens first."""
        more: dict[str, Any] = run.cache.arguments if isinstance(run.cache, OwnCache) else {"use_cache": False}
        if run.begin > 0 and has_encoder(self.model):
            return {**of_decoder(self.model, tokens_1L), **more}
        return {"input_ids": tokens_1L, **beginning(self.model, tokens_1L.device), **more}

    def _following(self, tape: Tape | None) -> Iterator[RemovableHandle]:
        """Hooks that know which sequence runs: what enters at the first layer, attends, leaves at the last."""
        layers: Any = self.model.get_submodule(self.window.layers)

        def of_run(hook: Callable[[_Run], Callable[..., Any] | None]) -> Callable[..., Any]:
            def call(*given: Any) -> Any:
                run = _running.get()
                found = None if self._is_calling or run is None else hook(run)
                return None if found is None else found(*given)

            return call

        def put_in(run: _Run) -> Callable[..., Any] | None:
            return None if run.hidden_1LD is None else putting_in(run.hidden_1LD)

        for level in range(self.window.first, self.window.stop):
            layer: nn.Module = layers[level]
            yield layer.register_forward_pre_hook(of_run(_entering(level, tape)), with_kwargs=True)
        entry: nn.Module = layers[self.window.first]
        yield entry.register_forward_pre_hook(of_run(put_in), with_kwargs=True, prepend=True)
        if not self.window.is_last:
            leaving: nn.Module = layers[self.window.stop - 1]
            yield leaving.register_forward_hook(of_run(lambda run: taking_out(run.left)))


def _entering(level: int, tape: Tape | None) -> Callable[[_Run], Callable[..., Any] | None]:
    def seam(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert tape is not None
        return replace_first_argument(args, kwargs, tape.enter(first_argument(args, kwargs)))

    def enter(run: _Run) -> Callable[..., Any] | None:
        run.attention.enter(level, run.streams.layer(level))
        return None if tape is None else seam

    return enter


@contextmanager
def _current(run: _Run) -> Iterator[None]:
    token = _running.set(run)
    try:
        yield
    finally:
        _running.reset(token)


def _earlier(plan: Plan, place: int) -> Segment | None:
    """The trunk that a segment goes on from, with all tokens before."""
    parent = plan.segments[place].parent
    if parent is None:
        return None
    return replace(plan.segments[parent], parent=None, starts=(0,) * len(plan.segments[place].starts))


def _whole(segment: Segment, before: tuple[int, ...]) -> Segment:
    """A segment with the tokens before as its own rows."""
    length = len(before) + len(segment.tokens)
    return replace(
        segment,
        parent=None,
        starts=(0,) * len(segment.starts),
        stops=(length,) * len(segment.stops),
        head=tuple(range(length)),
        tokens=(*before, *segment.tokens),
    )


def _new_rows(visit: Visit, go: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Where all of a sequence runs again, visitors see what is new."""

    def visitor(value: Any) -> Any:
        run = _running.get()
        return run.cache.visit(visit, value, go) if run is not None and isinstance(run.cache, RunsAgain) else go(value)

    return visitor


def _unchanged(value: Any) -> Any:
    return value


def _distinct(visits: Sequence[Visit]) -> list[Visit]:
    """One of those that are at one port."""
    return list({(visit.module, visit.operation, visit.port): visit for visit in visits}.values())


def _stop_at(visit: Visit) -> Callable[[Any], Any]:
    return lambda value: stop(visit, value)


def _alone(visit: Visit, rows: PackedRows) -> Callable[[Any], Any]:
    """One sequence's value is the stream."""
    return lambda value: _landed(visit.visitor(value), rows)


def _landed(after: Any, rows: PackedRows) -> Any:
    """A layer's output with what visitors left to be done: here the next level has the same rows."""
    for level in list(rows.landing):
        for land in rows.landing.pop(level):
            hidden = land(after if isinstance(after, Tensor) else after[0])
            after = hidden if isinstance(after, Tensor) else (hidden, *after[1:])
    return after


def _parts(hidden_1TD: Tensor | None, lengths: list[int]) -> list[Tensor | None]:
    return [None] * len(lengths) if hidden_1TD is None else [*hidden_1TD[:, : sum(lengths)].split(lengths, 1)]
