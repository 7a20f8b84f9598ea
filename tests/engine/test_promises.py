"""Random programs merged in one pass give the bits they give alone and the numbers of Hugging Face, in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import CONFIGS, FAMILIES, Program, difference, model_of, programs, run_by_hand, served_together
from transformers import PreTrainedModel

from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.scheduler import PassPolicy

TOLERANCE = {torch.float32: 1e-5}  # of max(1, max|plain|)
NUM_USERS = 32


class Served:
    """A family in one process beside the plain model."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.family, self.dtype = family, dtype
        self.plain: PreTrainedModel = model_of(family, dtype)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=1, policy=PassPolicy(budget_tokens=1 << 20, max_members=1000))
        self.model = Model(self.backend)

    def run_together(self, users: list[Program]) -> list[list[torch.Tensor]]:
        return served_together(self.model, self.backend, users, self.dtype)


@pytest.fixture(scope="module", params=CONFIGS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param), torch.float32)


@pytest.fixture(scope="module", params=CONFIGS)
def served_bf16(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(request.param, tmp_path_factory.mktemp(request.param), torch.bfloat16)


def check_merged_is_alone(served: Served, users: list[Program]) -> list[list[torch.Tensor]]:
    merged = served.run_together(users)
    for program, together in zip(users, merged, strict=True):
        (alone,) = served.run_together([program])
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a, b), (program, (a.float() - b.float()).abs().max())
    return merged


many = settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target],
)


@many
@given(data=st.data())
def test_32_random_programs_merged_get_their_own_bits_and_hugging_faces_numbers(
    served: Served, data: st.DataObject
) -> None:
    users = [data.draw(programs(FAMILIES[served.family])) for _ in range(NUM_USERS)]
    for program, ours in zip(users, check_merged_is_alone(served, users), strict=True):
        assert difference(ours, run_by_hand(served.plain, program), program) <= TOLERANCE[torch.float32], program


@settings(many, max_examples=2)
@given(data=st.data())
def test_32_random_programs_merged_get_their_own_bits_in_bf16(served_bf16: Served, data: st.DataObject) -> None:
    check_merged_is_alone(served_bf16, [data.draw(programs(FAMILIES[served_bf16.family])) for _ in range(NUM_USERS)])


@settings(many, max_examples=20)
@given(data=st.data())
def test_edits_matter(served: Served, data: st.DataObject) -> None:
    """The oracle itself would notice a dropped edit: edited programs move their last logits."""
    program = data.draw(programs(FAMILIES[served.family]).filter(lambda program: program.has_edits))
    edited, plain = (run_by_hand(served.plain, program, without_edits=flag) for flag in (False, True))
    adds = [
        action
        for each in program.actions
        for action in each
        if action.kind == "add" and "layers.0" in action.place.module
    ]
    if adds:
        moved = max(
            (a - b).abs().max().item() for x, y in zip(edited, plain, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert moved > 100 * TOLERANCE[torch.float32]


def test_bf16_is_as_close_to_the_float32_reference_as_plain_hugging_face(served_bf16: Served) -> None:
    reference = model_of(served_bf16.family)
    with torch.no_grad():  # the same weights: those that bf16 can say
        for exact, rounded in zip(reference.parameters(), served_bf16.plain.parameters(), strict=True):
            exact.copy_(rounded)
    generator = torch.Generator().manual_seed(1)
    ours, plain = [], []
    for length in (3, 9, 17, 40):
        ids = torch.randint(1, 96, (length,), generator=generator).tolist()
        with served_bf16.model.trace(ids):
            logits = served_bf16.model.output.logits.save()
        with torch.no_grad():
            exact = reference(torch.tensor([ids]), use_cache=False).logits
            theirs = served_bf16.plain(torch.tensor([ids]), use_cache=False).logits
        ours.append((logits.float() - exact).abs().mean().item())
        plain.append((theirs.float() - exact).abs().mean().item())
    assert sum(ours) <= 1.1 * sum(plain)
