"""Runs plans on a model that is called as it is: each invoke of a request is one call of the unmodified module.

Calls go one after another, each behind those that it takes values from (`scheduling.call_turns`), in the caller's own
thread. Those that take values from each other go in order of their sites (`engine.lockstep`): at a site that somebody
reads or writes a call waits until all that comes before it in the others has happened. A call ends behind the last site
that is needed of it. What a module raises fails its request and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.arguments import Arguments, Selector
from engine.constants import Constants
from engine.fragments import RequestState, ShardContext
from engine.leaves import first_argument
from engine.links import Solo
from engine.lockstep import in_order, stop
from engine.memory import told_out_of_memory
from engine.module_state import kept_tensors
from engine.named import NamedParameters
from engine.ops import TORCH_DTYPES
from engine.probe import named_tensors
from engine.recorder import memory_of
from engine.results import MemorySink, ResultSink, Writer, sink_for
from engine.stage import replace_first_argument
from engine.stopwatch import Stopwatch
from engine.turns import earlier
from engine.whole_sites import arguments_of, told
from engine.whole_tape import NoGradientError, Ports, WholeTape, cuts_of, sweep
from engine.writes import member_of, with_member
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.given import with_given
from polytrace.graph import Given, NodeId, Port, Read, SiteGrad, Write
from polytrace.graph import Turn as GradientTurn
from polytrace.sources import SiteIndex
from scheduling.call_turns import Turn, turns_of
from scheduling.checks import table_of
from scheduling.plan import PROLOGUE, Fragment, Member, Phase, Plan, Program, RequestId, ShardResult, Wave

Visits = dict[tuple[str, Port, int], int]  # (module, port, visit) -> order, of one invoke


class WholeShard:
    """The process that holds the model. `model` stays as it is, on its device, in its mode."""

    def __init__(self, model: nn.Module, description: ModelDescription, *, constant_bytes: int = 4 << 30) -> None:
        self.model = model
        device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
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
        self._states: dict[RequestId, CallState] = {}
        self._writer = Writer()

    @torch.inference_mode(False)
    def run(self, plan: Plan) -> ShardResult:
        """Runs a pass: the waves of its members, one after another."""
        watch = Stopwatch()
        for request in plan.ended:
            self._states.pop(request, None)
        states = [self._enter(member) for member in plan.members]
        for member, state in zip(plan.members, states, strict=True):
            self._run_wave(member, state)
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
            loaded={state.program.request: state.loaded_bytes for state in states if state.loaded_bytes},
            seconds=watch.seconds,
            busy_seconds=watch.seconds,
            began=watch.began,
            phases=tuple(watch.phases),
            values=values,
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

    def _run_wave(self, member: Member, state: CallState) -> None:
        wave = member.program.waves[member.wave]
        if wave.of is not None:
            self._run_back(wave, wave.of, state)
        else:
            if wave.is_taped:
                state.begin_tapes(member.wave, frozenset(memory_of(tensor) for _, tensor in named_tensors(self.model)))
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
            sweep(state.tapes[of], tuple(fragments), run)
            state.end_sweep()
        except Exception as error:  # noqa: BLE001  whatever code of the model raises on its way back
            memory = told_out_of_memory(error)
            is_ours = isinstance(error, PolytraceError)
            reason = str(error) if is_ours else f"the way back through {type(self.model).__name__} raised {told(error)}"
            state.fail(place, memory or reason, is_out_of_memory=memory is not None)

    def _run_turn(self, turn: Turn, state: CallState) -> None:
        fragments = {one.order: one for one in turn.fragments}
        if PROLOGUE in fragments:
            state.run(fragments.pop(PROLOGUE), None)
        visits = _visits_of(state, fragments)
        nodes = [state.program.graph.nodes[node] for one in turn.fragments for node in one.nodes]
        is_in_place = any(isinstance(node, Write) and node.in_place for node in nodes)
        kept = frozenset(map(memory_of, kept_tensors(self.model))) if is_in_place else frozenset()
        tapes = {invoke: tape for invoke in turn.invokes if (tape := state.tape_of(invoke)) is not None}
        for invoke, tape in tapes.items():
            visits[invoke].update(_visits_at(state, tape))
        calls = [_Call(visits[invoke], kept=kept, tape=tapes.get(invoke)) for invoke in turn.invokes]
        pending = sorted(fragments)

        def meet(order: int, values: Mapping[int, Any]) -> dict[int, Any]:
            """Everything that is due up to a visit, which some calls have come to."""
            sides = {
                number: Side(value, calls[number].changing, calls[number].kept) for number, value in values.items()
            }
            port = {turn.invokes[number]: side for number, side in sides.items()}
            with torch.no_grad():
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
                self._go(calls[0], state, turn.invokes[0], partial(_alone, meet))
            except Exception as error:  # noqa: BLE001  whatever code of the model raises is its request's
                failed(0, error)
        elif calls:
            threads = torch.get_num_threads()
            pairs = zip(calls, turn.invokes, strict=True)
            in_order([partial(self._in_lane, call, state, invoke, threads) for call, invoke in pairs], meet, failed)
        for order in pending:  # of sites that no call came to
            state.run_at(fragments[order], {})

    def _in_lane(self, call: _Call, state: CallState, invoke: int, threads: int) -> None:
        """What torch keeps for each thread, and then the call."""
        torch.set_num_threads(threads)
        with ExitStack() as own:
            if self.context.device.type == "cuda":
                own.enter_context(torch.cuda.device(self.context.device))
            self._go(call, state, invoke, stop)

    def _go(self, call: _Call, state: CallState, invoke: int, come: Callable[[int, Any], Any]) -> None:
        """One call, up to the last site that is needed of it."""
        call.come = come
        with call.recording(), _hooked(self.model, call), _current(call), suppress(_Enough):
            args, kwargs = state.arguments(invoke)
            self.model(*args, **kwargs)


_NOTHING = (
    "nothing of the loss comes back to here: behind this place the call does not make it of this value, or does so "
    "without gradients (torch.no_grad(), detach())"
)


class CallState(RequestState):
    """One request, whose reads and writes are of whole tensors."""

    def __init__(self, program: Program, context: ShardContext, sink: ResultSink) -> None:
        super().__init__(program, context, sink)
        self.tapes: dict[int, dict[int, WholeTape]] = {}  # of waves that are run backwards later, by invoke

    def begin_tapes(self, wave: int, own: frozenset[int]) -> None:
        """The calls of a wave are recorded. `own` is the memory of the model's tensors."""
        cuts = cuts_of(self.program, wave)
        self.tapes[wave] = {invoke: WholeTape(cuts=orders, own=own) for invoke, orders in cuts.items()}

    def tape_of(self, invoke: int) -> WholeTape | None:
        """That of a call of this wave."""
        assert self.member is not None, "a wave has begun"
        return self.tapes.get(self.member.wave, {}).get(invoke)

    def end_wave(self, wave: Wave) -> None:
        """Tapes that nobody runs back any more are forgotten; all of them when the request has failed."""
        for freed in self.tapes.copy() if self.has_failed else wave.frees:
            self.tapes.pop(freed, None)

    def arguments(self, invoke: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a call is given: tensors of its own, so that code of the model may change them in place."""
        inputs = self.program.invokes[invoke].inputs
        assert inputs is not None, "the request was checked"
        return arguments_of(with_given(inputs, self._given))

    def _local_parameter(self, path: str) -> Tensor:
        if self.context.parameters[path].is_meta:
            raise ValueError(f"{path} is offloaded, and there only while its module runs: call the module instead")
        return super()._local_parameter(path)

    def _given(self, given: Given) -> Tensor:
        return self._constant(given.name).clone()

    def run_at(self, fragment: Fragment, sides: Mapping[int, Side]) -> None:
        """Runs a fragment at a visit that calls have come to, each with its side of the module, by invoke."""
        self._sides = sides
        self.run(fragment, None)

    def _is_only(self, look: SiteGrad) -> bool:
        """Whether no other run of its call gives the same read a gradient."""
        nodes = self.program.graph.nodes
        return sum(isinstance(one, SiteGrad) and (one.turn, one.at) == (look.turn, look.at) for one in nodes) == 1

    def begin_sweep(self) -> None:
        """A wave is run back."""
        self._gives: dict[NodeId, bool] = {}  # reads and writes that took a gradient -> whether there was any

    def end_sweep(self) -> None:
        """Fails the request where nothing has come to anybody: plain torch has no gradients there, and not zeros."""
        if self._gives and not any(self._gives.values()):
            self.fail(next(iter(self._gives)), _NOTHING)

    def run_back_at(self, fragment: Fragment, ports: Ports) -> None:
        """Runs a fragment where the gradients of calls have come to a visit, by invoke."""
        self._ports = ports
        self.run(fragment, None)

    def _turn(self, node: SiteGrad) -> Tensor | None:
        """Takes a graph's turn at the gradient of a site; its value, None where it has none."""
        at = self.program.graph.nodes[node.at]
        assert isinstance(at, (Read, Write))
        gradient = self._ports.get(at.invoke, {}).get(at.site.selector)
        if gradient is None:
            raise LookupError(f"this call did not come to {at.site}: what it visits depends on its values")
        is_behind = any(not self.is_in_place(write) for write in earlier(self, node.at, at))
        if node.turn is GradientTurn.TAKE:
            is_assigned = is_behind or not self.is_in_place(node.at)
            self._gives[node.at] = gradient.has_come(is_behind=is_assigned)
            return gradient.take(is_assigned=is_assigned).to(self.context.device)
        if node.turn is GradientTurn.LOOK:
            self._gives[node.at] = gradient.has_come(is_behind=is_behind)
            if not self._gives[node.at] and self._is_only(node):
                raise LookupError(_NOTHING)
            return gradient.look(is_behind=is_behind).to(self.context.device)
        assert node.value is not None
        value = self.values[node.value.node]
        if node.turn is GradientTurn.ADD:
            gradient.add(value, is_behind=is_behind)
        else:
            gradient.set(value, is_behind=is_behind)
        return None

    def _run_node(self, node_id: NodeId, order: int, port: Any) -> None:
        node = self.program.graph.nodes[node_id]
        if isinstance(node, SiteGrad):
            if not self.has_failed:
                value = self._turn(node)
                if value is not None:
                    self.values[node_id] = value
                self.fired.append(node_id)
            return
        if not isinstance(node, (Read, Write)):
            super()._run_node(node_id, order, port)
            return
        if self.has_failed:
            return
        side = self._sides.get(node.invoke)
        if side is None:
            raise LookupError(f"this call did not come to {node.site}: what it visits depends on its values")
        if isinstance(node, Read):
            value = side.read(node.site.selector)
            facts = self.program.facts[node_id]
            if facts is not None and (tuple(value.shape), value.dtype) != (facts.shape, TORCH_DTYPES[facts.dtype]):
                told = f"{node.site} is {value.dtype} {list(value.shape)} in this call"
                planned = f"planned was {facts.dtype} {list(facts.shape)}"
                raise LookupError(f"{told}, {planned}: it depends on more than the arguments")
            self.values[node_id] = value.to(self.context.device)
        else:
            side.write(node.site.selector, self.values[node.value.node], in_place=node.in_place)
        self.fired.append(node_id)


class Side:
    """What a module takes or gives at one visit, while a request looks at it."""

    def __init__(self, value: Any, changing: Callable[[Tensor], None], kept: Collection[int]) -> None:
        """`changing` hears of tensors that are about to be written to; `kept` is memory of the model itself."""
        self.value = value
        self._changing = changing
        self._kept = kept

    def read(self, selector: Selector) -> Tensor:
        """A snapshot of a tensor in it."""
        return self._tensor(selector).clone()

    def write(self, selector: Selector, given: Tensor, *, in_place: bool) -> None:
        """Gives a tensor in it other content (`in_place`), or puts another in its place for who takes it from here."""
        tensor = self._tensor(selector)
        if given.shape != tensor.shape:
            raise ValueError(f"the value has shape {list(given.shape)}, the site {list(tensor.shape)} in this call")
        if in_place:
            if memory_of(tensor) in self._kept:
                raise ValueError("the model keeps this tensor behind the call: write `site = value`")
            self._changing(tensor)
            tensor.copy_(given)
        else:
            self.value = with_member(self.value, selector, torch.empty_like(tensor).copy_(given))

    def _tensor(self, selector: Selector) -> Tensor:
        found = self.value
        for key in selector:
            found = member_of(found, key)
        if not isinstance(found, Tensor):
            raise LookupError("there is no tensor here in this call: what it gives depends on its values")
        if found.layout is not torch.strided or found.is_nested:
            raise LookupError("in this call the tensor here is a nested or sparse one, which is not read or written")
        return found


@dataclass(slots=True)
class _Call:
    """One call on its way."""

    visits: Visits
    come: Callable[[int, Any], Any] = stop  # gives what goes on of what a visit has
    kept: Collection[int] = ()  # memory of the model itself, where something is written in place
    counts: dict[tuple[str, Port], int] = field(default_factory=dict)  # of visits so far
    num_left: int = 0
    tape: WholeTape | None = None  # where its gradient is asked for

    def __post_init__(self) -> None:
        self.num_left = len(self.visits)

    def visit(self, path: str, port: Port, value: Any) -> Any:
        """What goes on of a side of a module; raises where nothing behind it is needed."""
        number = self.counts.get((path, port), 0)
        self.counts[path, port] = number + 1
        order = self.visits.get((path, port, number))
        if order is None:
            return value
        after = self.come(order, value)
        if self.tape is not None:
            after = self.tape.cut(order, value, after)
        self.num_left -= 1
        if not self.num_left:
            raise _Enough
        return after

    def recording(self) -> AbstractContextManager[None]:
        """How the model is run."""
        return torch.no_grad() if self.tape is None else self.tape.recording()

    def changing(self, tensor: Tensor) -> None:
        """Somebody writes to a tensor in place."""
        if self.tape is not None:
            self.tape.saved.protect([tensor])


class _Enough(BaseException):
    """Ends a call early: there is nothing left to do. Code of models that catches every Exception lets it through."""


class _Runner:
    """What a request's own calls of modules need."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A module that runs on a request's own value is no visit: no call is going in the thread that asks."""
        yield


_going: ContextVar[_Call | None] = ContextVar("whole_call", default=None)


@contextmanager
def _current(call: _Call | None) -> Iterator[None]:
    token = _going.set(call)
    try:
        yield
    finally:
        _going.reset(token)


def _alone(meet: Callable[[int, Mapping[int, Any]], dict[int, Any]], order: int, value: Any) -> Any:
    with _current(None):
        return meet(order, {0: value})[0]


@contextmanager
def _hooked(model: nn.Module, call: _Call) -> Iterator[None]:
    """Hooks on the modules that a call is visited at; they are about that call alone."""

    def before(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _going.get() is not call:
            return None
        first = first_argument(args, kwargs)
        after = call.visit(path, Port.INPUT, first)
        given = Arguments(args, kwargs) if after is first else Arguments(*replace_first_argument(args, kwargs, after))
        given = call.visit(path, Port.INPUTS, given)
        return given.args, dict(given.kwargs)

    def behind(path: str, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return call.visit(path, Port.OUTPUT, output) if _going.get() is call else None

    ports: dict[str, set[bool]] = {}
    for path, port, _ in call.visits:
        ports.setdefault(path, set()).add(port is Port.OUTPUT)
    with ExitStack() as hooks:
        for path, sides in ports.items():
            module = model.get_submodule(path)
            if False in sides:
                handle = module.register_forward_pre_hook(partial(before, path), with_kwargs=True)
                hooks.callback(handle.remove)
            if True in sides:
                hooks.callback(module.register_forward_hook(partial(behind, path)).remove)
        yield


def _visits_at(state: CallState, tape: WholeTape) -> Visits:
    """Where a call is visited for its gradient."""
    found: Visits = {}
    for order, nodes in tape.cuts.items():
        for node_id in nodes.values():
            node = state.program.graph.nodes[node_id]
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
