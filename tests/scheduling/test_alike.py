"""Which requests to a model that is called as it is share a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polytrace.certificate import PassEntry
from polytrace.description import Leaf, Limits, ModelDescription, PassLayout, Rows, SiteInfo
from polytrace.graph import Graph, Inputs, Invoke, NodeId, Port, Read, Ref, Request, Save, Site
from scheduling.alike import MOST_CALLS, AlikeCalls
from scheduling.plan import Plan, Program, RequestId, ShardResult, ValueFacts
from scheduling.policy import PassPolicy
from scheduling.scheduler import Scheduler
from scheduling.whole import described, work_out_call

LEAF = Leaf(
    selector=(),
    tail=(1,),
    dtype="float32",
    read_refusal=None,
    write_refusal=None,
    in_place_refusal=None,
    num_columns=1,
    is_whole=True,
)
OUTPUT = SiteInfo(
    module="", port=Port.OUTPUT, visit=0, order=0, stage=0, structure="tensor", rows=Rows.ALL, leaves=(LEAF,)
)


def description() -> ModelDescription:
    plain: dict[str, Any] = {"dtype": "float32", "class_name": "Any", "layers": ".", "fingerprint": "", "config": {}}
    zeros = dict.fromkeys(
        ("vocab_size", "hidden_size", "num_layers", "key_value_bytes", "hidden_bytes", "row_multiple"), 0
    )
    empty: dict[str, Any] = {"modules": (), "sites": (), "parameters": ()}
    return ModelDescription(
        name="m",
        stages=1,
        ranks=1,
        limits=Limits(max_sequence_tokens=1),
        has_kept_rows=False,
        has_forks=False,
        layout=PassLayout.WHOLE,
        **plain,
        **zeros,
        **empty,
    )


def called(name: str, *numbers: int, tenant: str = "") -> Program:
    """A request with calls that have these numbers among their arguments."""
    invokes = tuple([Invoke(sequences=((),), inputs=Inputs(args=(number,), kwargs={})) for number in numbers])
    read = Read(site=Site(module="", port=Port.OUTPUT), invoke=0, where="a.py:1")
    graph = Graph(nodes=(read, Save(value=Ref(NodeId(0)), name="s", where="a.py:2")))
    request = Request(graph=graph, invokes=invokes, constants={})
    own = described(description(), [(OUTPUT,)] * len(numbers))
    facts = (ValueFacts(shape=(1,), dtype="float32", num_bytes=4), None)
    return replace(work_out_call(RequestId(name), request, own, facts), tenant=tenant)


class Deployment:
    """A scheduler, and a shard that merges or does not."""

    def __init__(self, *, merges: bool, tells: bool = False) -> None:
        policy = PassPolicy(merges_calls=True, tells_of_other_tenants=tells)
        self.scheduler = Scheduler(description(), policy)
        self._merges = merges

    def run(self, *programs: Program) -> list[list[str]]:
        """The requests of each pass."""
        for program in programs:
            self.scheduler.add(program)
        passes = []
        while self.scheduler.has_work():
            plan = self.scheduler.next_pass()
            requests = [member.program.request for member in plan.members]
            passes.append([str(request) for request in requests])
            merged = (tuple(requests),) if self._merges and len(requests) > 1 else ()
            self.scheduler.complete(plan, (_result(plan, merged),))
        return passes

    def entries(self) -> dict[str, PassEntry]:
        return {str(one.request): one.receipt.passes[0] for one in self.scheduler.take_outcomes() if one.receipt}


def _result(plan: Plan, merged: tuple[tuple[RequestId, ...], ...]) -> ShardResult:
    return ShardResult(
        pass_id=plan.pass_id,
        stage=0,
        rank=0,
        failures=(),
        fired={member.program.request: (NodeId(0), NodeId(1)) for member in plan.members},
        saved_bytes={},
        carried_bytes=0,
        gathered_bytes=0,
        seconds=0.0,
        busy_seconds=0.0,
        merged=merged,
    )


def test_requests_whose_calls_are_alike_share_a_pass() -> None:
    one = Deployment(merges=True)
    assert one.run(called("a", 1), called("b", 2), called("c", 1), called("d", 1, 1)) == [["a", "c", "d"], ["b"]]
    assert {name: entry.calls_merged for name, entry in one.entries().items()} == {"a": 3, "b": 0, "c": 3, "d": 3}


def test_many_calls_or_several_structures_go_alone() -> None:
    alike = AlikeCalls()
    assert alike.of(called("a", *[1] * MOST_CALLS)) is None
    assert alike.of(called("b", 1, 2)) is None
    assert alike.of(called("c", 1, 1)) is alike.of(called("d", 1))


def test_what_the_shard_does_not_merge_goes_alone_before_long() -> None:
    one = Deployment(merges=False)
    sizes = [len(one.run(called(f"a{turn}", 1), called(f"b{turn}", 1))) for turn in range(5)]
    assert sizes == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("tells", [False, True])
def test_a_tenant_hears_of_its_own_calls(tells: bool) -> None:
    one = Deployment(merges=True, tells=tells)
    one.run(called("a", 1, tenant="x"), called("b", 1, tenant="x"), called("c", 1, tenant="y"))
    own = {name: entry.calls_merged for name, entry in one.entries().items()}
    assert own == (dict.fromkeys("abc", 3) if tells else {"a": 2, "b": 2, "c": 1})
