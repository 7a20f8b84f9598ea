"""Many users' equal small programs in one pass: one table of rows, each with the bits that it has alone.

And with the numbers of plain Hugging Face with the same lines in hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import model_of
from torch import Tensor
from transformers import PreTrainedModel

from engine.local import LocalBackend
from polytrace.errors import RunError
from polytrace.graph import Save
from polytrace.methods.steering import _plan
from polytrace.model import Model
from scheduling.plan import Plan
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome

USERS, WIDTH, LAYERS = 6, 32, 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
Sites = Callable[[int, str], Any]


class Served:
    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.plain: PreTrainedModel = model_of("llama", dtype)
        self.plain.save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=1, policy=EVERYONE)
        self.model = Model(self.backend)

    def request(self, prompt: Any, body: Callable[[Any], Any], **options: Any) -> Any:
        with self.model.trace(prompt, run=False, **options) as tracer:
            body(self.model.model.layers)
            self.model.lm_head.output[:, -1].save()
        return tracer.built_request()

    def run(self, requests: list[Any]) -> list[Outcome]:
        return self.backend.run_together([self.backend.work_out(request) for request in requests])

    @property
    def num_rows(self) -> int:
        return self.backend.shard.row_tables.num_rows


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("llama"), request.param)


@pytest.fixture(scope="module")
def served_float32(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("llama"), torch.float32)


def vector(user: int) -> Tensor:
    drawn = torch.randn(WIDTH, generator=torch.Generator().manual_seed(user))
    return 2.0 * drawn / drawn.norm()


def columns(user: int) -> Tensor:
    drawn = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(user))
    return torch.linalg.qr(drawn)[0].T.contiguous()


def prompt_of(user: int, length: int = 5) -> list[int]:
    return [5 + (7 * user + 3 * place) % 90 for place in range(length)]


# A form: what a user writes for a hidden state `h` that is a layer's output; in a hook it runs in place on the tensor.


def assigned(value: Any, h: Any) -> None:
    h[:] = value


FORMS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "steer": lambda h, v, p: h.__iadd__(v),
    "steer scaled": lambda h, v, p: h.__iadd__(0.7 * v),
    "steer the last": lambda h, v, p: h[:, -1].__iadd__(v),
    "steer some": lambda h, v, p: h[:, 1:3].__iadd__(v),
    "ablate": lambda h, v, p: h.__isub__((h @ v)[..., None] * v),
    "ablate a unit": lambda h, v, p: h.__isub__((h * (v / v.norm())).sum(-1, keepdim=True) * (v / v.norm())),
    "ablate, assigned": lambda h, v, p: assigned(h - (h @ v).unsqueeze(-1) * v, h),
    "ablate by einsum": lambda h, v, p: h.__isub__(torch.einsum("bsd,d->bs", h, v)[..., None] * v),
    "ablate the last": lambda h, v, p: h[:, -1].__isub__((h[:, -1] @ v)[:, None] * v),
    "project": lambda h, v, p: h.__isub__((h @ p.T) @ p),
    "project by einsum": lambda h, v, p: h.__isub__(torch.einsum("bsk,kd->bsd", torch.einsum("bsd,kd->bsk", h, p), p)),
    "choose": lambda h, v, p: assigned(torch.where(h > v, h, v), h),
    "mean": lambda h, v, p: assigned(v, h),
    "scale": lambda h, v, p: assigned(h / h.norm(dim=-1, keepdim=True) * v.abs().sum(), h),
    "gate": lambda h, v, p: h.__iadd__(((h @ v) > 0).to(h.dtype)[..., None] * v),
}


def record(form: str, user: int, served: Served) -> Callable[[Any], None]:
    v, p = vector(user).to(served.dtype), columns(user).to(served.dtype)

    def body(layers: Any) -> None:
        for layer in layers:
            FORMS[form](layer.output[0], v, p)
            FORMS[form](layer.mlp.output, v, p)

    return body


def by_hand(served: Served, prompt: list[int], form: str | None, user: int) -> Tensor:
    v, p = vector(user).to(served.dtype), columns(user).to(served.dtype)

    def hook(_module: Any, _args: Any, out: Tensor) -> Tensor:
        assert form is not None
        FORMS[form](out, v, p)
        return out

    with ExitStack() as stack, torch.no_grad():
        for layer in served.plain.model.layers if form is not None else ():
            for module in (layer, layer.mlp):
                stack.callback(module.register_forward_hook(hook).remove)
        return served.plain(torch.tensor([prompt]), use_cache=False).logits[:, -1].float()


def saved(outcome: Outcome, request: Any) -> list[Tensor]:
    assert outcome.error is None, outcome.error
    return [outcome.values[node.name] for node in request.graph.nodes if isinstance(node, Save)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(("form", "sharing"), [(form, ["tenant", "off"][n % 2]) for n, form in enumerate(FORMS)])
def test_members_of_a_table_have_their_own_bits_and_hugging_faces_numbers(
    served: Served, form: str, sharing: str
) -> None:
    requests = [served.request([prompt_of(user)], record(form, user, served), sharing=sharing) for user in range(USERS)]
    before = served.num_rows
    together = served.run(requests)
    assert served.num_rows - before >= USERS * 2 * LAYERS, "they ran as tables"
    before = served.num_rows
    alone = [served.run([request])[0] for request in requests]
    assert served.num_rows == before
    effect = 0.0
    for user, (merged, own, request) in enumerate(zip(together, alone, requests, strict=True)):
        assert same(saved(merged, request), saved(own, request)), user
        assert merged.receipt is not None
        assert own.receipt is not None
        assert merged.receipt.fired == own.receipt.fired
        ours, hand = saved(merged, request)[-1].float(), by_hand(served, prompt_of(user), form, user)
        assert (ours - hand).abs().max() <= TOLERANCE[served.dtype] * max(1.0, float(hand.abs().max()))
        effect = max(effect, float((by_hand(served, prompt_of(user), None, user) - hand).abs().max()))
    assert effect > 10 * TOLERANCE[served.dtype]


def test_forms_failures_pads_and_forks_in_one_pass_leave_each_other_alone(served_float32: Served) -> None:
    served = served_float32
    model, clean = served.model, [prompt_of(0, 6)]
    ragged = [prompt_of(1, 3), prompt_of(2, 6), prompt_of(3, 4)]

    def saves(layers: Any) -> None:
        for layer in layers:
            layer.output.save()
            layer.mlp.output[:, -1].save()

    def later(user: int) -> Callable[[Any], None]:
        def body(layers: Any) -> None:
            early = layers[0].output[0][:, -1] * 2.0  # from one table to the next
            layers[2].output[0][:, -1] += early - vector(user)
            layers[3].output[0][:, -1] = early

        return body

    def fails(layers: Any) -> None:
        hidden = layers[1].output[0]
        beyond = (hidden[:1, -1] > -1e9).sum() + 1000  # known only when it runs
        hidden[:, -1] += torch.zeros(WIDTH)[beyond]
        record("steer", 3, served)(layers)

    def twice(user: int) -> Callable[[Any], None]:
        def body(layers: Any) -> None:
            hidden = layers[1].output[0]
            hidden += vector(user)
            layers[1].output[0][:, -1].save()  # behind its own write
            layers[1].output[0][:] = hidden * 2.0

        return body

    requests = [
        served.request(prompts, body, sharing=sharing)
        for prompts in (clean, ragged)
        for body, sharing in [
            *[(record("ablate", user, served), "tenant") for user in (1, 1, 2)],
            *[(record("steer", user, served), "off") for user in (1, 2)],
            *[(record("steer the last", user, served), "tenant") for user in (3, 4)],
            *[(saves, "tenant")] * 2,
            *[(later(user), "tenant") for user in (5, 6)],
            *[(twice(user), "tenant") for user in (5, 6)],
            *[(fails, "tenant")] * 2,
        ]
    ]
    before = served.num_rows
    together = served.run(requests)
    assert served.num_rows - before > 100
    num_failed = 0
    for merged, request in zip(together, requests, strict=True):
        (own,) = served.run([request])
        if own.error is not None:
            num_failed += 1
            assert isinstance(merged.error, RunError)
            assert merged.error.where is not None
            assert merged.error.where == own.error.where
            assert merged.error.where.startswith("test_row_tables.py:")
        else:
            assert same(saved(merged, request), saved(own, request))
    assert num_failed == 4
    assert model.description is not None


def test_a_failure_inside_a_table_is_its_members_own(served_float32: Served) -> None:
    """Two write the same lines; one's value turns out not to be what was planned."""
    served = served_float32

    def body(count: int) -> Callable[[Any], None]:
        def run(layers: Any) -> None:
            hidden = layers[0].output[0]
            chosen = hidden[:, -1][(hidden[:, -1, 0] > -1e9).long() * count]  # a row that is there, or is not
            layers[1].output[0][:, -1] += chosen

        return run

    requests = [served.request([prompt_of(user)], body(count)) for user, count in enumerate([0, 0, 7, 0])]
    together = served.run(requests)
    assert [outcome.error is None for outcome in together] == [True, True, False, True]
    for merged, request in zip(together, requests, strict=True):
        (own,) = served.run([request])
        assert merged.error is not None or same(saved(merged, request), saved(own, request))


def test_steering_of_many_users_runs_as_tables(served_float32: Served) -> None:
    served = served_float32
    layers = list(range(LAYERS))

    def steering(user: int) -> Callable[[Any], None]:
        return lambda _: _plan(served.model, vector(user), layers, None, None, None).add(served.model, 1.5)

    requests = [served.request([prompt_of(user)], steering(user)) for user in range(USERS)]
    before = served.num_rows
    together = served.run(requests)
    assert served.num_rows - before >= USERS * LAYERS
    for merged, request in zip(together, requests, strict=True):
        assert same(saved(merged, request), saved(served.run([request])[0], request))


class Seen:
    """Shards that remember the plans they ran."""

    def __init__(self, shards: Any) -> None:
        self._shards, self.plans = shards, list[Plan]()
        self.have_room, self.finished = shards.have_room, shards.finished

    def submit(self, plan: Plan) -> None:
        self.plans.append(plan)
        self._shards.submit(plan)


def test_a_pass_that_runs_again_and_again_gives_the_same_and_leaves_nothing(served_float32: Served) -> None:
    """As steps of a generation do: tables, constants and what is worked out of them are kept between passes."""
    served = served_float32
    shards = served.backend.shards
    forms = ["ablate a unit", "project", "steer scaled"]
    requests = [served.request([prompt_of(user, 1)], record(form, user, served)) for user in range(4) for form in forms]
    served.backend.shards = seen = Seen(shards)
    first = served.run(requests)
    served.backend.shards = shards
    (plan,) = seen.plans
    staying = replace(plan, members=tuple(replace(member, is_last_wave=False) for member in plan.members))
    shard = served.backend.shard
    before = shard.row_tables.num_rows
    results = [shard.run(staying) for _ in range(4)]
    few = replace(staying, members=staying.members[:6], views=tuple(each for each in staying.views if each.member < 6))
    results.append(shard.run(few))
    results.append(shard.run(replace(plan, members=plan.members)))
    assert shard.row_tables.num_rows - before == (5 * len(plan.members) + 6) * (2 * LAYERS + 1)
    for result in results:
        assert not result.failures
        for (request, name), value in result.values.items():
            own = next(each for each in first if each.request == request)
            assert torch.equal(value, own.values[name])
        for member in plan.members[:6]:
            assert result.fired[member.program.request] == results[0].fired[member.program.request]
    assert shard.row_tables.is_empty


def test_steps_of_generations_run_as_tables_while_others_come_and_end(served_float32: Served) -> None:
    served = served_float32
    model = served.model
    forms = ["steer", "ablate", "steer the last", "project"]

    def request(user: int, form: str, new: int) -> Any:
        prompt = prompt_of(user, 3 + user)
        with model.generate(prompt, max_new_tokens=new, eos=None, run=False) as tracer, tracer.all():
            before = model.model.layers[0].output[0] * 0.5  # from one table to a later one
            record(form, user, served)(model.model.layers)
            model.model.layers[3].output[0][:] += before
            model.lm_head.output[:, -1].save()
        return tracer.built_request()

    requests = [request(user, form, 2 + 3 * user) for form in forms for user in range(3)]
    before = served.num_rows
    together = served.run(requests)
    decoding = served.num_rows - before
    assert decoding > len(forms) * (3 * 1 + 2 * 3) * 2 * LAYERS, "so many members at so many sites of steps"
    told = set()
    for merged, one in zip(together, requests, strict=True):
        (own,) = served.run([one])
        assert merged.error is None, merged.error
        assert own.error is None
        assert merged.receipt is not None
        assert own.receipt is not None
        assert merged.receipt.generated == own.receipt.generated
        assert merged.receipt.fired == own.receipt.fired
        assert merged.values.keys() == own.values.keys()
        assert all(torch.equal(merged.values[name], own.values[name]) for name in own.values)
        told.add(merged.receipt.generated[0].ids)
    assert len(told) > len(forms)
    assert served.backend.shard.row_tables.is_empty
