"""Programs at random, run as planned and by the bare semantics."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st

from polytrace.description import Limits, ModelDescription, SiteInfo
from polytrace.errors import GraphError
from polytrace.graph import Call, Constant, Mask, NodeId, Op, Parameter, Port, Read, Ref, Save, Site, Write, operands
from scheduling.plan import PROLOGUE
from scheduling.program import certify
from tests.scheduling.simulator import CycleFoundError, Ran, Semantics, Symbols, run
from tests.scheduling.tiny import HIDDEN, Recorder, tiny_llama

STEPS = [
    "read",
    "read",
    "read",
    "write",
    "write",
    "write",
    "op",
    "grow",
    "call",
    "parameter",
    "constant",
    "mask",
    "save",
]


@st.composite
def recorded(draw: st.DrawFn, pass_tokens: int = 4096) -> Recorder:
    """A random graph on a model of 1 to 3 stages; about a third of them have a cycle."""
    limits = Limits(max_sequence_tokens=64, pass_tokens=pass_tokens)
    description = tiny_llama(num_layers=3, stages=draw(st.integers(1, 3)), limits=limits)
    recorder = Recorder(description, *[[[1, 2, 3], [4, 5]], [[6, 7]], [[8]]][: draw(st.integers(1, 3))])
    sites = [info for info in description.sites if info.leaves[0].read_refusal is None]
    values: list[Ref] = []

    def site(choice: list[SiteInfo]) -> tuple[str, Port]:
        info = draw(st.sampled_from(choice))
        return info.module, info.port

    def invoke() -> int:
        return draw(st.integers(0, len(recorder.invokes) - 1))

    for step in draw(st.lists(st.sampled_from(STEPS), min_size=4, max_size=30)):
        if step == "read":
            values.append(recorder.read(*site(sites), invoke=invoke()))
        elif step == "constant":
            values.append(recorder.constant((HIDDEN,)))
        elif step == "mask":
            values.append(recorder.mask(invoke()))
        elif step == "parameter":
            values.append(recorder.parameter(draw(st.sampled_from(description.parameters)).path))
        elif values and step in ("op", "grow", "call"):
            chosen = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
            shape = (10_000,) if step == "grow" else (draw(st.integers(1, 50)),)
            if step == "call":
                module = draw(st.sampled_from(["model.embed_tokens", "model.layers.1.mlp", "lm_head"]))
                values.append(recorder.call(module, *chosen, shape=shape))
            else:
                values.append(recorder.op("add", *chosen, shape=shape))
        elif values and step == "write":
            module, port = site(draw(st.sampled_from([sites, sites[: len(sites) // 2]])))  # early ones open waves
            where = invoke()
            shape = recorder.view(Site(module=module, port=port), where)
            fitted = recorder.op("add", draw(st.sampled_from(values)), shape=shape)
            recorder.write(module, fitted, port, where, in_place=draw(st.booleans()))
        elif values and step == "save":
            recorder.save(draw(st.sampled_from(values)))
    assume(values)
    recorder.save(values[-1])
    return recorder


def orders_of(recorder: Recorder) -> dict[NodeId, int]:
    return {
        NodeId(position): recorder.sites[node.site][0].order
        for position, node in enumerate(recorder.nodes)
        if isinstance(node, (Read, Write))
    }


def simulate(recorder: Recorder, symbols: Symbols) -> Ran:
    stages = {info.order: info.stage for info in recorder.description.sites}
    return run(recorder.work_out(), recorder.request.graph, orders_of(recorder), stages, symbols)


def has_cycle(semantics: Semantics) -> bool:
    try:
        for node in semantics.needed():
            semantics.value(node)
    except CycleFoundError:
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.one_of(recorded(), recorded(pass_tokens=3)))
def test_a_planned_run_gives_what_the_order_rules_say(recorder: Recorder) -> None:
    symbols = Symbols()
    semantics = Semantics(recorder.request.graph, orders_of(recorder), symbols)
    if has_cycle(semantics):
        event("cycle")
        with pytest.raises(GraphError, match="a cycle"):
            recorder.work_out()
        return
    ran = simulate(recorder, symbols)
    event(f"{len(recorder.work_out().waves)} waves")
    for position, node in enumerate(recorder.nodes):
        if isinstance(node, Save):
            assert ran.saved[node.name] == semantics.value(NodeId(position))
        if isinstance(node, Write):
            assert ran.written[NodeId(position)] == semantics.value(NodeId(position))
    assert ran.ran.keys() == semantics.needed()


@settings(max_examples=60, deadline=None)
@given(recorded())
def test_only_writes_and_floating_values_run_more_than_once(recorder: Recorder) -> None:
    assume(not has_cycle(Semantics(recorder.request.graph, orders_of(recorder), Symbols())))
    ran = simulate(recorder, Symbols())
    floating = floating_nodes(recorder)
    for node, count in ran.ran.items():
        if isinstance(recorder.nodes[node], Write) or node in floating:
            continue
        assert count == 1
    assert all(count <= recorder.description.stages for node, count in ran.ran.items() if node in floating)


@settings(max_examples=60, deadline=None)
@given(recorded())
def test_a_value_goes_to_a_stage_once_and_a_floating_one_never(recorder: Recorder) -> None:
    assume(not has_cycle(Semantics(recorder.request.graph, orders_of(recorder), Symbols())))
    moves = simulate(recorder, Symbols()).moves
    assert len(moves) == len(set(moves))
    assert not {node for node, _ in moves} & floating_nodes(recorder)


@settings(max_examples=60, deadline=None)
@given(recorded())
def test_the_number_of_waves_is_what_the_rules_ask_for(recorder: Recorder) -> None:
    semantics = Semantics(recorder.request.graph, orders_of(recorder), Symbols())
    assume(not has_cycle(semantics))
    rules = Rules(recorder, semantics)
    assert len(recorder.work_out().waves) == 1 + max(rules.point(node)[0] for node in semantics.needed())


@settings(max_examples=60, deadline=None)
@given(recorded())
def test_a_certificate_adds_up(recorder: Recorder) -> None:
    assume(not has_cycle(Semantics(recorder.request.graph, orders_of(recorder), Symbols())))
    program = recorder.work_out()
    certificate = certify(program, tuple(recorder.facts), recorder.description)
    moved = sum(
        known.num_bytes for node, _ in simulate(recorder, Symbols()).moves if (known := program.facts[node]) is not None
    )
    assert certificate.carried_bytes == moved
    assert certificate.passes == len(program.waves)
    assert certificate.result_bytes == sum(slot.facts.num_bytes for slot in program.saves)
    assert [None if shape is None else shape.shape for shape in certificate.nodes] == [
        None if known is None else known.shape for known in recorder.facts
    ]


def floating_nodes(recorder: Recorder) -> set[NodeId]:
    """Values of constants, masks and operations on them alone."""
    floating: set[NodeId] = set()
    for position, node in enumerate(recorder.nodes):
        is_made = isinstance(node, (Constant, Mask, Op))
        if is_made and all(operand in floating for operand in operands(node)):
            floating.add(NodeId(position))
    return floating


class Rules:
    """The rules of placement, word by word, without thought for time."""

    def __init__(self, recorder: Recorder, semantics: Semantics) -> None:
        self.recorder, self.semantics = recorder, semantics
        self.description: ModelDescription = recorder.description
        self._points: dict[NodeId, tuple[int, int, int]] = {}

    def point(self, node: NodeId) -> tuple[int, int, int]:
        if node not in self._points:
            self._points[node] = self._point(node)
        return self._points[node]

    def _point(self, node: NodeId) -> tuple[int, int, int]:
        made: Any = self.recorder.nodes[node]
        needs = max((self.point(operand) for operand in operands(made)), default=(0, 0, PROLOGUE))
        if isinstance(made, Read):
            info = self.recorder.sites[made.site][0]
            return max((self.point(write)[0] for write in self.semantics.seen(node)), default=0), info.stage, info.order
        if isinstance(made, Write):
            info = self.recorder.sites[made.site][0]
            wave = needs[0] if needs <= (needs[0], info.stage, info.order) else needs[0] + 1
            return wave, info.stage, info.order
        if isinstance(made, Call):
            home = next(module.first_stage for module in self.description.modules if module.path == made.module)
            if home == needs[1]:
                return needs
            return needs[0] + (home < needs[1]), home, PROLOGUE
        if isinstance(made, Parameter):
            return 0, next(info.stage for info in self.description.parameters if info.path == made.path), PROLOGUE
        return needs
