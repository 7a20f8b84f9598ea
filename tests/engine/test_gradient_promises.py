"""What is promised of gradients beside others: whatever neighbours do, mine are the bits that I get alone.

Neighbours share every pass, there and back: their losses are not finite, they fail on the way there or back, ask
for more memory than there is, or are cancelled between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from processes import ProcessBackend, ProcessShards
from programs import get, values_in_order
from torch import Tensor, nn
from width import wide

from engine.local import LocalBackend
from polytrace.errors import CancelledError, RunError, TooLargeError
from polytrace.model import Model
from scheduling.loop import step
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome

LLAMA = FAMILIES["llama"]
EDITED, EARLY, LATE = LLAMA.residual(0), LLAMA.residual(1), LLAMA.residual(2)
MINE, THEIRS = [[3, 1, 4, 1, 5], [9, 2, 6]], [[2, 7, 1, 8], [2, 8, 1, 8, 2, 8]]
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
ABSURD = 1 << 46  # bytes: no machine has them, and the allocator says so
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
BF16_FACTOR = 1.1  # of plain Hugging Face's own error in bf16


def weights(seed: int, width: int = LLAMA.vocabulary) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)) / width**0.5


def asked(
    model: Any,
    prompts: list[list[int]],
    harm: str = "",
    *,
    seed: int = 0,
    losses: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Adds a vector, and saves its gradient and those of two layers, of so many losses, one backward each."""
    vector = weights(seed, LLAMA.width).to(dtype)
    if harm in ("nan written", "inf written"):
        vector = vector * float(harm.split()[0])
    with model.trace(run=False) as tracer:
        with tracer.invoke(prompts):
            added = tracer.value(vector)
            hidden = get(model, EDITED)
            hidden += added
            early, late = get(model, EARLY), get(model, LATE)
            beyond = (early[:1, -1] > -1e9).sum() + 1000  # known only when it runs
            if harm == "forward":
                torch.zeros(LLAMA.width)[beyond].save()
            logits = get(model, LLAMA.logits())[:, -1]
        for number in range(losses):
            loss = (logits @ weights(100 * number + seed).to(dtype)).tanh().sum()
            if harm in ("nan", "inf"):
                loss = loss * float(harm)
            with loss.backward():
                if harm == "backward":
                    late.grad[:, -1] = torch.zeros(LLAMA.width)[(late.grad[:1, -1] > -1e9).sum() + 1000]
                for value in (early, late, added):
                    value.grad.save()
    return tracer


HARMS = ["nan", "inf", "nan written", "inf written", "forward", "backward"]


class Asked:
    """Requests of one backend, together."""

    def __init__(self, backend: Any, tracers: list[Any]) -> None:
        self.tracers = tracers
        self.outcomes: list[Outcome] = backend.run_together(
            [backend.work_out(each.built_request()) for each in tracers]
        )

    def values(self, number: int) -> list[Tensor]:
        assert self.outcomes[number].error is None, self.outcomes[number].error
        return values_in_order(self.tracers[number], self.outcomes[number].values)

    def sharing(self, number: int) -> list[int]:
        """Requests in each of its passes."""
        receipt = self.outcomes[number].receipt
        assert receipt is not None
        return [entry.requests for entry in receipt.passes]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalBackend:
    return LocalBackend(str(folder), threads=1, policy=EVERYONE)


@pytest.fixture(scope="module", params=["1x1", "2x2", wide("1x4")])
def backend(request: pytest.FixtureRequest, folder: Path, local: LocalBackend) -> Iterator[Any]:
    """Stages x ranks."""
    stages, ranks = map(int, request.param.split("x"))
    if stages * ranks == 1:
        yield local
        return
    shards = ProcessShards(str(folder), stages=stages, ranks=ranks)
    yield ProcessBackend(str(folder), shards, folder, EVERYONE)
    shards.close()


def holds_nothing(backend: Any) -> bool:
    """Whether a shard in this process has no tape, and the scheduler counts none."""
    is_free = backend.scheduler._room.tapes.taken_bytes == 0
    return is_free and (not isinstance(backend, LocalBackend) or backend.shard._tapes.is_empty)


def test_neighbours_that_are_not_finite_or_fail_there_or_back_leave_my_gradients_as_they_are(backend: Any) -> None:
    model = Model(backend)
    alone = Asked(backend, [asked(model, MINE)]).values(0)
    others = [asked(model, THEIRS, harm, seed=place) for place, harm in enumerate(HARMS)]
    both = Asked(backend, [*others[:3], asked(model, MINE), *others[3:]])
    assert same(both.values(3), alone)
    there, back = both.sharing(3)
    assert there == len(HARMS) + 1
    assert back >= len(HARMS), "all but one that may have failed by then"
    del both.outcomes[3], both.tracers[3]
    for place, harm in enumerate(HARMS):
        error = both.outcomes[place].error
        if harm in ("forward", "backward"):
            assert isinstance(error, RunError) and str(error.where).startswith("test_gradient_promises.py:"), harm
        else:
            assert not all(value.isfinite().all() for value in both.values(place)), harm
    assert holds_nothing(backend)


def test_a_neighbour_that_is_cancelled_between_there_and_back_changes_nothing(backend: Any) -> None:
    model = Model(backend)
    tracer = asked(model, MINE)
    alone = Asked(backend, [tracer]).values(0)
    mine, other = (backend.work_out(each.built_request()) for each in (tracer, asked(model, THEIRS, losses=2)))
    scheduler = backend.scheduler
    scheduler.add(mine)
    scheduler.add(other)
    forward = scheduler.next_pass()
    assert len(forward.members) == 2
    backend.shards.submit(forward)
    finish(backend)
    scheduler.cancel(other.request)
    while scheduler.has_work():
        step(scheduler, backend.shards)
    outcomes = {outcome.request: outcome for outcome in scheduler.take_outcomes()}
    assert isinstance(outcomes[other.request].error, CancelledError)
    assert same(values_in_order(tracer, outcomes[mine.request].values), alone)
    assert holds_nothing(backend)


def finish(backend: Any) -> None:
    for plan, results in backend.shards.finished():
        assert isinstance(results, tuple)
        backend.scheduler.complete(plan, results)


def test_a_request_that_is_cancelled_alone_leaves_nothing_behind(local: LocalBackend) -> None:
    program = local.work_out(asked(Model(local), MINE).built_request())
    local.scheduler.add(program)
    local.shards.submit(local.scheduler.next_pass())
    finish(local)
    assert not local.shard._tapes.is_empty
    local.scheduler.cancel(program.request)
    while local.scheduler.has_work():
        step(local.scheduler, local.shards)
    (outcome,) = local.scheduler.take_outcomes()
    assert isinstance(outcome.error, CancelledError)
    assert holds_nothing(local)


@pytest.mark.parametrize("harm", ["forward", "backward"])
def test_a_request_that_fails_alone_leaves_nothing_behind(local: LocalBackend, harm: str) -> None:
    assert isinstance(Asked(local, [asked(Model(local), MINE, harm)]).outcomes[0].error, RunError)
    assert holds_nothing(local)


def test_requests_that_share_a_prompt_get_their_own_sums(backend: Any) -> None:
    """Rows that two share would add up the gradients of both."""
    model = Model(backend)
    alone = [Asked(backend, [asked(model, MINE, seed=seed)]).values(0) for seed in (0, 1)]
    both = Asked(backend, [asked(model, MINE, seed=seed) for seed in (0, 1, 0)])
    assert both.sharing(0) == [3, 3]
    for number, seed in enumerate((0, 1, 0)):
        assert same(both.values(number), alone[seed])
    assert not same(alone[0], alone[1])


def test_a_trace_of_the_same_prompt_without_gradients_has_its_own_pass(backend: Any) -> None:
    model = Model(backend)
    with model.trace(MINE, run=False) as plain:
        get(model, LATE).save()
        get(model, LLAMA.logits()).save()
    wanted = [Asked(backend, [each]).values(0) for each in (asked(model, MINE), plain)]
    both = Asked(backend, [asked(model, MINE), plain, plain])
    assert same(both.values(0), wanted[0])
    assert same(both.values(1), wanted[1]) and same(both.values(2), wanted[1])
    assert (both.sharing(0), both.sharing(1)) == ([1, 1], [2])


def test_one_that_goes_back_several_times_goes_with_one_that_goes_back_once(backend: Any) -> None:
    model = Model(backend)
    several, once = asked(model, MINE, losses=3), asked(model, THEIRS, seed=1)
    alone = [Asked(backend, [each]).values(0) for each in (several, once)]
    both = Asked(backend, [several, once, once])
    assert [same(both.values(number), alone[min(number, 1)]) for number in range(3)] == [True] * 3
    assert (both.sharing(0), both.sharing(1)) == ([3, 3, 1, 1], [3, 3])
    assert not same(alone[0][:3], alone[0][3:6]), "each loss has gradients of its own"


def test_requests_whose_gradients_stop_elsewhere_go_apart_and_all_end(backend: Any) -> None:
    model = Model(backend)

    def deep(layer: int) -> Any:
        with model.trace(MINE, run=False) as tracer:
            value = get(model, LLAMA.residual(layer))
            (get(model, LLAMA.logits())[:, -1] @ weights(layer)).tanh().sum().backward()
            value.grad.save()
        return tracer

    ways = [deep(layer) for layer in (0, 1, 2)]
    alone = [Asked(backend, [each]).values(0) for each in ways]
    both = Asked(backend, [*ways, *ways, asked(model, THEIRS)])
    for number in range(6):
        assert same(both.values(number), alone[number % 3])
        assert both.sharing(number) == [2, 2]
    assert both.sharing(6) == [1, 1]
    assert holds_nothing(backend)


# --- memory


@contextmanager
def little_memory(backend: LocalBackend, most_rows: int, *, on_the_way_back: bool) -> Iterator[list[int]]:
    """A layer asks for more than there is when more rows than that come to it, or their gradients do."""
    seen: list[int] = []

    def greedy(tensor: Tensor) -> None:
        seen.append(tensor.shape[1])
        if seen[-1] > most_rows:
            torch.empty(ABSURD, dtype=torch.uint8)

    def there(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        greedy(args[0])

    def back(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(greedy)

    module = backend.shard.loaded.model.get_submodule("model.layers.2.mlp.up_proj")
    handle = module.register_forward_hook(back) if on_the_way_back else module.register_forward_pre_hook(there)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("on_the_way_back", [False, True])
def test_one_that_is_too_large_on_its_way_ends_alone_and_the_others_have_their_bits(
    folder: Path, on_the_way_back: bool
) -> None:
    backend = LocalBackend(str(folder), threads=1, policy=EVERYONE)
    model = Model(backend)
    long = [list(range(3, 53)), list(range(5, 55))]
    alone = Asked(backend, [asked(model, MINE)]).values(0)
    with little_memory(backend, 70, on_the_way_back=on_the_way_back) as seen:
        both = Asked(backend, [asked(model, MINE), asked(model, long), asked(model, MINE)])
    assert max(seen) > 100
    assert same(both.values(0), alone) and same(both.values(2), alone)
    error = both.outcomes[1].error
    assert isinstance(error, TooLargeError) and "100 rows" in str(error), error
    assert backend.scheduler.budget_tokens < EVERYONE.budget_tokens, "it has learnt how many rows do not fit"
    assert holds_nothing(backend)


# --- half precision


def by_hand(plain: Any, prompts: list[list[int]], precision: torch.dtype) -> list[Tensor]:
    """What `asked` saves, one prompt at a time; the vector and the weights of the loss are rounded to `precision`."""
    added, weighting = (weights(0, width).to(precision).to(plain.dtype) for width in (LLAMA.width, LLAMA.vocabulary))
    added.requires_grad_()
    found: dict[str, list[Tensor]] = {EARLY.module: [], LATE.module: []}

    def edit(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output + added if isinstance(output, Tensor) else (output[0] + added, *output[1:])

    def keep(own: list[Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            own.append(output if isinstance(output, Tensor) else output[0])
            own[-1].retain_grad()

        return hook

    handles = [plain.get_submodule(EDITED.module).register_forward_hook(edit)]
    handles += [plain.get_submodule(name).register_forward_hook(keep(own)) for name, own in found.items()]
    total: Any = 0.0
    for prompt in prompts:
        logits = plain(torch.tensor([prompt]), use_cache=False).logits[:, -1]
        total = total + (logits @ weighting).tanh().sum()
    total.backward()
    for handle in handles:
        handle.remove()
    longest = max(map(len, prompts))
    saved = []
    for own in found.values():
        grads = [value.grad[0] for value in own if value.grad is not None]
        saved.append(torch.stack([nn.functional.pad(grad, (0, 0, longest - len(grad), 0)) for grad in grads]))
    assert added.grad is not None
    return [*saved, added.grad]


def test_in_full_precision_the_numbers_are_those_of_plain_autograd(local: LocalBackend) -> None:
    wanted = by_hand(model_of("llama"), MINE, torch.float32)
    for ours, theirs in zip(Asked(local, [asked(Model(local), MINE)]).values(0), wanted, strict=True):
        assert float((ours - theirs).abs().max()) <= FLOAT32_TOLERANCE * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_half_precision_the_error_is_that_of_plain_autograd_and_neighbours_change_no_bit(
    family: str, tmp_path: Path
) -> None:
    """Errors are root mean squares over all elements of a gradient, over 24 prompts."""
    half = model_of(family, torch.bfloat16)
    half.save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1, policy=EVERYONE)
    model = Model(backend)
    prompts = torch.randint(3, 90, (24, 12), generator=torch.Generator().manual_seed(0)).tolist()
    mine, other = (asked(model, own, dtype=torch.bfloat16, seed=seed) for seed, own in enumerate((prompts, THEIRS)))
    alone = Asked(backend, [mine]).values(0)
    both = Asked(backend, [other, mine, other])
    assert both.sharing(1) == [3, 3]
    assert same(both.values(1), alone)
    plain = by_hand(half, prompts, torch.bfloat16)
    wanted = by_hand(half.float(), prompts, torch.bfloat16)
    for ours, theirs, exact in zip(alone, plain, wanted, strict=True):
        error, plain_error = (float((each.float() - exact).square().mean().sqrt()) for each in (ours, theirs))
        assert 0 < plain_error < float(exact.square().mean().sqrt()), "a model whose numbers say nothing"
        assert error <= BF16_FACTOR * plain_error, (error, plain_error)
