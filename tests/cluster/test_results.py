"""A generation's result file: a place for every step, whichever come, and a header that always fits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from services import make_model

import polytrace
from cluster.facts import FactsRecorder, RecordedFacts
from cluster.results import end_of, room_for, without_holes
from polytrace.certificate import Receipt
from polytrace.errors import ServiceError
from polytrace.graph import Request
from polytrace.wire import decode_result, result_header
from scheduling.plan import Program, RequestId, SaveSlot
from scheduling.step_saves import all_slots, data_bytes
from scheduling.working_out import work_out

STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with polytrace.load(str(make_model(tmp_path_factory.mktemp("results") / "model")), threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def request_of_steps(model: Any) -> Request:
    with model.generate([[3, 1, 4], [1, 5]], max_new_tokens=STEPS, eos=None, logprobs=2, run=False) as tracer:
        states = []
        for step in tracer.iter[:]:
            hidden = model.model.layers[1].output[0]
            states.append(hidden[:, -1].sum(-1).save())
            if step % 2:
                (hidden > 0).any().save()  # a byte: the next step's saves begin behind a gap
            model.model.layers[2].output[0][:] *= 2
        torch.stack(states).save()
    request: Request = tracer.request
    return request


@pytest.fixture(scope="module")
def ran(model: Any, request_of_steps: Request) -> tuple[Program, Receipt, tuple[SaveSlot, ...]]:
    program = model.backend.work_out(request_of_steps)
    (outcome,) = model.backend.run_together([program])
    assert outcome.error is None and outcome.receipt is not None, outcome.error
    return program, outcome.receipt, outcome.saves


def test_what_came_is_what_was_planned_when_all_steps_come(ran: Any) -> None:
    program, receipt, saves = ran
    assert sorted(map(repr, saves)) == sorted(map(repr, all_slots(program)))
    assert len(receipt.generated) == 2 and {len(one.ids) for one in receipt.generated} == {STEPS}
    places = sorted((slot.offset, slot.offset + slot.facts.num_bytes) for slot in saves)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
    assert places[-1][1] <= data_bytes(program)


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_whichever_steps_come_the_header_fits_and_others_can_read_the_file(
    model: Any, ran: Any, request_of_steps: Request, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    program, receipt, saves = ran
    came = [slot for slot in saves if data.draw(st.booleans())]
    room = room_for(program, request_of_steps, model.description.num_layers)
    slots = without_holes(came)
    body = bytes(place % 251 for place in range(end_of(slots)))
    content = result_header(slots, receipt, room) + body
    values, told = decode_result(content)
    assert told == receipt and values.keys() == {slot.name for slot in came}
    for slot in came:
        assert bytes(values[slot.name].data) == body[slot.offset :][: slot.facts.num_bytes]
    file: Path = tmp_path_factory.mktemp("file") / "result.safetensors"
    file.write_bytes(content)
    with safe_open(file, framework="pt") as stored:
        assert values.keys() <= set(stored.keys())


def test_facts_of_steps_are_handed_out_as_they_were_asked_for(model: Any, request_of_steps: Request) -> None:
    backend = model.backend
    plain = replace(
        request_of_steps,
        graph=replace(request_of_steps.graph, nodes=()),
        invokes=tuple(replace(one, generation=None) for one in request_of_steps.invokes),
    )
    notebook = FactsRecorder(backend._infer)
    first, _ = work_out(RequestId("a"), request_of_steps, model.description, notebook.infer)
    kept = notebook.encode(request_of_steps)
    again, _ = work_out(RequestId("a"), request_of_steps, model.description, RecordedFacts(kept).infer)
    assert again == first
    with pytest.raises(ServiceError, match="other steps than when it was checked"):
        RecordedFacts(kept).infer(plain)
