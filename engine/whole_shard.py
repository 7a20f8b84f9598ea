"""Runs plans on a model that is called as it is: each invoke of a request is one call of the unmodified module.

Calls go one after another, each behind those that it takes values from (`scheduling.call_turns`), in the caller's own
thread. Those that take values from each other go in order of their sites (`engine.lockstep`): at a site that somebody
reads or writes a call waits until all that comes before it in the others has happened. A call ends behind the last site
that is needed of it. What a module raises fails its request and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from engine.constants import Constants
from engine.fragments import ShardContext
from engine.links import Solo
from engine.lockstep import in_order, stop
from engine.memory import told_out_of_memory
from engine.module_state import kept_memory
from engine.named import NamedParameters
from engine.probe import named_tensors
from engine.recorder import memory_of
from engine.results import MemorySink, Writer, sink_for
from engine.stopwatch import Stopwatch
from engine.whole_call import Enough, Visits, WholeCall, alone, current, hooked
from engine.whole_groups import CallGroups
from engine.whole_manner import layer_by_layer
from engine.whole_places import home_of, offloaded_modules
from engine.whole_side import Side
from engine.whole_sites import told
from engine.whole_state import CallState
from engine.whole_tape import NoGradientError, Ports, WholeTape, nothing_written_runs_again, sweep
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.graph import Read, Write
from polytrace.sources import SiteIndex
from scheduling.call_turns import Turn, turns_of
from scheduling.checks import table_of
from scheduling.plan import PROLOGUE, Fragment, Member, Phase, Plan, RequestId, ShardResult, Wave

_NOT_IN_TURNS = (
    "calls that take values from each other in both directions go at each other's pace, and {path} has its weights for "
    "one call at a time (they are offloaded): place it on a device, or let values go one way and send two requests"
)


class WholeShard:
    """The process that holds the model. `model` stays as it is, on its device, in its mode."""

    def __init__(
        self,
        model: nn.Module,
        description: ModelDescription,
        *,
        constant_bytes: int = 4 << 30,
        merges: bool = False,
        is_fixed: bool = True,
    ) -> None:
        """`merges`: calls are one call where the gate lets them (`engine.whole_merging`); `is_fixed`: nobody sets
        anything on the model between two calls.
        """
        self.model = model
        device = home_of(model)
        table = table_of(description)
        self.context = ShardContext(
            runner=_Runner(model),  # type: ignore[arg-type]
            links=Solo(),
            sites=SiteIndex(description, table.sources),
            parameters=NamedParameters(dict(named_tensors(model)), (), {}),
            parameter_infos={info.path: info for info in description.parameters},
            table=table,
            levels=table.levels,
            device=device,
            constants=Constants(device, constant_bytes),
        )
        has_parts = (path for path, module in offloaded_modules(model) if next(module.children(), None) is not None)
        self._left_open = next(has_parts, None)  # what another call would take the weights from, halfway through
        self._states: dict[RequestId, CallState] = {}
        self._writer = Writer()
        self.merging = CallGroups(model, is_fixed=is_fixed) if merges else None

    @torch.inference_mode(False)
    def run(self, plan: Plan) -> ShardResult:
        """Runs a pass: the waves of its members, one after another."""
        watch = Stopwatch()
        for request in plan.ended:
            self._states.pop(request, None)
        states = [self._enter(member) for member in plan.members]
        self._run_waves(list(zip(plan.members, states, strict=True)))
        watch.lap(Phase.COMPUTING)
        self._writer.wait()
        watch.lap(Phase.SAVING)
        values: dict[tuple[RequestId, str], Any] = {}
        for member, state in zip(plan.members, states, strict=True):
            for node, message in state.sink.failures:
                state.fail(node, message)
            request = member.program.request
            if isinstance(state.sink, MemorySink):
                values |= {(request, name): value for name, value in state.sink.values.items()}
                state.sink.values = {}
            if member.is_last_wave:
                self._states.pop(request, None)
        return ShardResult(
            pass_id=plan.pass_id,
            stage=0,
            rank=0,
            failures=tuple(state.failure for state in states if state.failure is not None),
            fired={state.program.request: tuple(state.fired) for state in states},
            saved_bytes={state.program.request: state.sink.saved_bytes for state in states},
            carried_bytes=0,
            gathered_bytes=0,
            loaded={one.program.request: one.brought.loaded_bytes for one in states if one.brought.loaded_bytes},
            seconds=watch.seconds,
            busy_seconds=watch.seconds,
            began=watch.began,
            phases=tuple(watch.phases),
            values=values,
            merged=() if self.merging is None else self.merging.take_merged(),
        )

    def forget(self) -> None:
        """Forgets all requests."""
        self._writer.wait()
        self._states.clear()
        self.context.constants.clear()

    def stop(self) -> None:
        """Ends its threads."""
        self._writer.close()
        self._states.clear()

    def _enter(self, member: Member) -> CallState:
        request = member.program.request
        state = self._states.get(request)
        if state is None:
            state = CallState(member.program, self.context, sink_for(member.program, self._writer))
            self._states[request] = state
        state.begin_wave(member, {})
        return state

    def _run_waves(self, waves: Sequence[tuple[Member, CallState]]) -> None:
        alone = waves
        if self.merging is not None:
            merging = [each for each in waves if _is_plain(each[0])]
            self.merging.run(merging, self._run_turn)
            for member, state in merging:
                state.end_wave(member.program.waves[member.wave])
            alone = [each for each in waves if not _is_plain(each[0])]
        for member, state in alone:
            self._run_wave(member, state)

    def _run_wave(self, member: Member, state: CallState) -> None:
        wave = member.program.waves[member.wave]
        if wave.of is not None:
            self._run_back(wave, wave.of, state)
        else:
            if wave.is_taped:
                own = frozenset(memory_of(tensor) for _, tensor in named_tensors(self.model) if not tensor.is_meta)
                state.begin_tapes(member.wave, own)
            for turn in turns_of(member.program, member.wave):
                if not state.has_failed:
                    self._run_turn(turn, state)
        state.end_wave(wave)

    def _run_back(self, wave: Wave, of: int, state: CallState) -> None:
        """Runs the calls of a wave backwards."""
        fragments = {one.order: one for one in wave.stages[0].fragments}
        if PROLOGUE in fragments:
            state.run(fragments.pop(PROLOGUE), None)
        if state.has_failed:
            return
        place = None

        def run(order: int, ports: Ports) -> None:
            nonlocal place
            if order in fragments:
                place = fragments[order].nodes[0]
                state.run_back_at(fragments[order], ports)

        try:
            state.begin_sweep()
            tapes = state.tapes[of]
            with nothing_written_runs_again(self.model, tapes.values()):
                sweep(tapes, tuple(fragments), run)
            state.end_sweep()
        except NoGradientError as error:
            state.fail(error.node, str(error))
        except Exception as error:  # noqa: BLE001  whatever code of the model raises on its way back
            memory = told_out_of_memory(error)
            is_ours = isinstance(error, PolytraceError)
            reason = str(error) if is_ours else f"the way back through {type(self.model).__name__} raised {told(error)}"
            state.fail(place, memory or reason, is_out_of_memory=memory is not None)

    def _run_turn(self, turn: Turn, state: CallState) -> None:
        fragments = {one.order: one for one in turn.fragments}
        if len(turn.invokes) > 1 and self._left_open is not None:
            state.fail(turn.fragments[-1].nodes[-1], _NOT_IN_TURNS.format(path=self._left_open))
            return
        if PROLOGUE in fragments:
            state.run(fragments.pop(PROLOGUE), None)
        visits = _visits_of(state, fragments)
        nodes = [(node, state.program.graph.nodes[node]) for one in turn.fragments for node in one.nodes]
        writes = [(place, node) for place, node in nodes if isinstance(node, Write)]
        is_in_place = any(node.in_place for _, node in writes)
        kept = kept_memory(self.model) if is_in_place else frozenset()
        tapes = {invoke: tape for invoke in turn.invokes if (tape := state.tape_of(invoke)) is not None}
        for invoke, tape in tapes.items():
            visits[invoke].update(_visits_at(state, tape))
            written = {(node.site.module, node.site.port): place for place, node in writes if node.invoke == invoke}
            tape.written.update(written)
        calls = [WholeCall(visits[invoke], kept=kept, tape=tapes.get(invoke)) for invoke in turn.invokes]
        pending = sorted(fragments)

        def meet(order: int, values: Mapping[int, Any]) -> dict[int, Any]:
            """Everything that is due up to a visit, which some calls have come to."""
            sides = {
                number: Side(value, call.changing, call.kept, is_graded=call.is_graded)
                for number, value in values.items()
                for call in (calls[number],)
            }
            port = {turn.invokes[number]: side for number, side in sides.items()}
            is_graded = bool(sides) and all(side.is_graded for side in sides.values())
            with torch.set_grad_enabled(is_graded):
                while pending and pending[0] <= order:
                    due = pending.pop(0)
                    state.run_at(fragments[due], port if due == order else {})
            return {number: side.value for number, side in sides.items()}

        def failed(number: int, error: Exception) -> None:
            if isinstance(error, NoGradientError):
                state.fail(error.node, str(error))
                return
            memory = told_out_of_memory(error)
            name = type(self.model).__name__
            first = min(fragments[order].nodes[0] for order in calls[number].visits.values())
            state.fail(first, memory or f"{name} raised {told(error)}", is_out_of_memory=memory is not None)

        if len(calls) == 1:
            try:
                self._go(calls[0], state, turn.invokes[0], partial(alone, meet))
            except Exception as error:  # noqa: BLE001  whatever code of the model raises is its request's
                failed(0, error)
        elif calls:
            threads = torch.get_num_threads()
            pairs = zip(calls, turn.invokes, strict=True)
            in_order([partial(self._in_lane, call, state, invoke, threads) for call, invoke in pairs], meet, failed)
        for order in pending:  # of sites that no call came to
            state.run_at(fragments[order], {})

    def _in_lane(self, call: WholeCall, state: CallState, invoke: int, threads: int) -> None:
        """What torch keeps for each thread, and then the call."""
        torch.set_num_threads(threads)
        with ExitStack() as own:
            if self.context.device.type == "cuda":
                own.enter_context(torch.cuda.device(self.context.device))
            self._go(call, state, invoke, stop)

    def _go(self, call: WholeCall, state: CallState, invoke: int, come: Callable[[int, Any], Any]) -> None:
        """One call, up to the last site that is needed of it."""
        call.come = come
        with call.recording(), hooked(self.model, call), current(call), suppress(Enough):
            args, kwargs = state.arguments(invoke)
            self.model(*args, **kwargs)


def _is_plain(member: Member) -> bool:
    """Whether no gradient is asked of a wave."""
    wave = member.program.waves[member.wave]
    return wave.of is None and not wave.is_taped


class _Runner:
    """What a request's own calls of modules need."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A module that runs on a request's own value is no visit: no call is going in the thread that asks."""
        with layer_by_layer():
            yield


def _visits_at(state: CallState, tape: WholeTape) -> Visits:
    """Where a call is visited for its gradient."""
    found: Visits = {}
    for order, cuts in tape.cuts.items():
        for cut in cuts.values():
            node = state.program.graph.nodes[cut.node]
            assert isinstance(node, (Read, Write))
            found[node.site.module, node.site.port, node.site.visit] = order
    return found


def _visits_of(state: CallState, fragments: Mapping[int, Fragment]) -> dict[int, Visits]:
    """Where calls are visited, by invoke."""
    found: dict[int, Visits] = {}
    for order, fragment in fragments.items():
        for node_id in fragment.nodes:
            node = state.program.graph.nodes[node_id]
            if isinstance(node, (Read, Write)):
                site = node.site
                found.setdefault(node.invoke, {})[site.module, site.port, site.visit] = order
    return found
