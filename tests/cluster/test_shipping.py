"""What shards have is not sent again, and they get the plans that were made."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from families import model_of
from generation_programs import crowd, written

from cluster.shipping import Incoming, Outgoing
from engine.local import LocalBackend
from polytrace.errors import ServiceError
from scheduling.plan import Plan
from scheduling.policy import PassPolicy

EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)


class _Kept:
    """The loop's shards, and all plans that they got."""

    def __init__(self, shards: Any) -> None:
        self.have_room, self.finished, self._shards = shards.have_room, shards.finished, shards
        self.plans: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._shards.submit(plan)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """Of generations that share passes."""
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    backend = LocalBackend(str(folder), threads=1, policy=EVERYONE)
    backend.shards = kept = _Kept(backend.shards)
    users = [user for seed in range(3) for user in crowd("llama", 4, seed)]
    outcomes = backend.run_together([backend.work_out(written(user)) for user in users])
    assert all(outcome.error is None for outcome in outcomes)
    return kept.plans


def programs(plans: list[Plan]) -> Iterator[tuple[str, int | None]]:
    for plan in plans:
        yield from ((member.program.request, member.part) for member in plan.members)


def test_shards_get_the_plans_and_each_program_once(plans: list[Plan]) -> None:
    outgoing, incoming = Outgoing(), Incoming()
    sent = 0
    for plan in plans:
        shipment = outgoing.pack(plan)
        sent += sum(program is not None for program in shipment.programs)
        assert incoming.unpack(shipment) == plan
    named = list(programs(plans))
    assert sent == len(set(named)) < len(named)


def test_nothing_is_known_of_requests_that_shards_have_forgotten(plans: list[Plan]) -> None:
    outgoing, incoming = Outgoing(), Incoming()
    for plan in plans:
        incoming.unpack(outgoing.pack(plan))
    assert not outgoing._sent and not incoming._programs


def test_after_a_loss_all_is_sent_again(plans: list[Plan]) -> None:
    outgoing, incoming = Outgoing(), Incoming()
    half = next(place for place, plan in enumerate(plans) if any(member.step > 1 for member in plan.members))
    for plan in plans[: half + 1]:
        incoming.unpack(outgoing.pack(plan))
    again = plans[half]
    incoming.forget_all()
    with pytest.raises(ServiceError, match="that never came"):
        incoming.unpack(outgoing.pack(again))
    incoming.forget_all()
    outgoing.forget_all()
    assert incoming.unpack(outgoing.pack(again)) == again


def test_what_is_the_same_at_all_layers_travels_as_one_number(plans: list[Plan]) -> None:
    plan = next(plan for plan in plans if plan.members and all(member.step > 0 for member in plan.members))
    outgoing, incoming = Outgoing(), Incoming()
    incoming.unpack(outgoing.pack(plan))  # its programs are there
    shipment = outgoing.pack(plan)
    assert incoming.unpack(shipment) == plan
    assert all(segment.starts[0] is None for segment in shipment.segments)
    assert 2 * len(pickle.dumps(shipment)) < len(pickle.dumps(_without_constants(plan)))


def _without_constants(plan: Plan) -> Plan:
    bare = [replace(member, program=replace(member.program, constants={})) for member in plan.members]
    return replace(plan, members=tuple(bare))
