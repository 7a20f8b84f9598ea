"""What calls of a model as it is keep for gradients: never more than the certificate says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from called_by_hand import first_of
from model_kinds import DIFFUSION, KINDS, Looped, seeded
from torch import Tensor, nn

from engine.whole_local import WholeBackend
from polytrace.errors import TooLargeError
from polytrace.whole_model import WholeModel
from scheduling.policy import PassPolicy
from scheduling.scheduler import Scheduler
from scheduling.whole import taped

MOST = 1.1  # times what is held may the certificate say


def gradient_of(model: Any, path: str, call: dict[str, Any], kind: str) -> Any:
    """A trace with two losses, and an edit of the kind."""
    with model.trace(**call, run=False) as tracer:
        module = model.get_submodule(path)
        own = first_of(module.output)
        if kind == "in place":
            own[..., 0] = 2 * own[..., 0] + 0.3
        if kind == "assigned" and hasattr(module.output, "dtype"):
            module.output = 0.5 * own
        end = first_of(model.output)
        for seed in (1, 2):
            with (end.float() * (0.1 * seed)).sum().backward():
                own.grad.save()
    return tracer


def held_and_told(backend: WholeBackend, tracer: Any) -> tuple[int, int]:
    """Bytes that tapes hold behind the call, with a gradient for each leaf, and those of the certificate."""
    program = backend.work_out(tracer.built_request())
    assert backend.validate(tracer.built_request()).tape_bytes == program.tape_bytes
    scheduler = Scheduler(backend.description, PassPolicy())
    scheduler.add(program)
    most = 0
    while scheduler.has_work():
        plan = scheduler.next_pass()
        result = backend.shard.run(plan)
        assert not result.failures
        states = backend.shard._states.values()
        tapes = [tape for state in states for tapes in state.tapes.values() for tape in tapes.values()]
        most = max(most, sum(tape.num_bytes + tape.gradient_bytes for tape in tapes))
        scheduler.complete(plan, (result,))
    return most, program.tape_bytes


@pytest.mark.parametrize("kind", [*KINDS, *DIFFUSION])
def test_no_more_is_held_than_the_certificate_says(kind: str) -> None:
    if kind in DIFFUSION:
        pytest.importorskip("diffusers")
    plain, path, call, _ = (KINDS | DIFFUSION)[kind]()
    for is_frozen, edit in ((False, "in place"), (True, "assigned")):
        backend = WholeBackend(plain.requires_grad_(not is_frozen), name=kind)
        held, told = held_and_told(backend, gradient_of(WholeModel(backend), path, call, edit))
        assert 0 < held <= told
        if kind not in _GATHERED:
            assert told <= MOST * held


_GATHERED = ("jamba",)  # without data every token's experts are gathered


class Deciding(nn.Module):
    """What it visits depends on its values, and not on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return self.second(torch.tanh(out)) if x.sum() > 0 else out


def test_where_values_decide_the_call_itself_is_measured() -> None:
    backend = WholeBackend(seeded(Deciding), name="deciding")
    model: Any = WholeModel(backend)
    with model.trace(torch.ones(2, 4), run=False) as tracer:
        hidden = model.first.output
        (model.output**2).sum().backward()
        hidden.grad.save()
    held, told = held_and_told(backend, tracer)
    assert 0 < held == told
    program, limits = backend.work_out(tracer.built_request()), backend.description.limits
    assert taped(program, told, replace(limits, tape_bytes=told)).tape_bytes == told
    with pytest.raises(TooLargeError, match=rf"keep {told:,} bytes; the limit is {told - 1:,}: ask for"):
        taped(program, told, replace(limits, tape_bytes=told - 1))


def test_several_calls_and_losses_are_counted_together() -> None:
    backend = WholeBackend(seeded(Looped), name="looped")
    model: Any = WholeModel(backend)

    def asked(num_calls: int) -> Any:
        with model.trace(run=False) as tracer:
            loss, seen = 0.0, []
            for _ in range(num_calls):
                with tracer.invoke(torch.randn(3, 4)):
                    hidden = model.shared.output
                    seen.append(hidden)
                    loss = loss + model.output["y"].sum()
            loss.backward()
            for hidden in seen:
                hidden.grad.save()
        return tracer

    one, three = (held_and_told(backend, asked(number)) for number in (1, 3))
    assert 0 < one[0] <= one[1]
    assert one[0] < three[0] <= three[1]
    with model.trace(torch.randn(3, 4), run=False) as tracer:
        model.output["y"].save()
    assert backend.work_out(tracer.built_request()).tape_bytes == 0
