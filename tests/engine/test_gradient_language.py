"""What the language says of gradients is what plain autograd says, with hooks by hand on the same weights (fp32)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from small import IDS, OTHER, WIDTH, close, loaded, small_llama
from torch import Tensor

import polytrace
from polytrace.errors import GraphError
from polytrace.graph import Backward

LAYER, TARGET = 2, 7
Edit = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama().requires_grad_(False)


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as model:
        yield model


class Run:
    """One forward of the plain model with gradients: what modules gave, before and behind edits."""

    def __init__(self, plain: Any, ids: list[int], **edits: Edit) -> None:
        """`edits` by layer, as `layer2=...`."""
        self.given: list[Tensor] = []
        self.kept: list[Tensor] = []

        def hook(number: int) -> Any:
            def run(module: Any, args: Any, output: Tensor) -> Tensor:
                self.given.append(output)
                edit = edits.get(f"layer{number}")
                self.kept.append(output if edit is None else edit(output))
                return self.kept[-1]

            return run

        with ExitStack() as stack, torch.enable_grad():
            start = plain.get_input_embeddings().register_forward_hook(
                lambda module, args, output: output.requires_grad_()
            )
            stack.callback(start.remove)
            for number, layer in enumerate(plain.model.layers):
                stack.callback(layer.register_forward_hook(hook(number)).remove)
            self.logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits


def layer(model: Any, number: int) -> Any:
    return model.model.layers[number].output[0]


def added(vector: Tensor) -> Edit:
    """Adds a vector to the last token's row, as a new tensor."""

    def edit(hidden: Tensor) -> Tensor:
        return torch.cat([hidden[:, :-1], hidden[:, -1:] + vector], 1)

    return edit


# --- reading


def test_one_tensor_at_two_places_has_one_total(model: Any, plain: Any) -> None:
    run = Run(plain, IDS)
    loss = run.logits[:, -1, TARGET].sum() + run.kept[1].square().sum()
    (expected,) = torch.autograd.grad(loss, run.kept[1])

    def record(*, later: bool) -> Tensor:
        with model.trace(IDS):
            early = layer(model, 1)
            late = model.model.layers[2].input
            with (model.lm_head.output[:, -1, TARGET].sum() + early.square().sum()).backward():
                grad = (late if later else early).grad.save()
        return grad

    close(record(later=False)[0], expected[0])
    close(record(later=True)[0], expected[0])
    with model.trace(IDS):  # what the loss is not made of has the same total at both places
        early, late = layer(model, 1), model.model.layers[2].input
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            grads = early.grad.save(), late.grad.save()
    assert torch.equal(*grads)
    with model.trace(IDS):  # what is written between is another tensor
        early = layer(model, 1)
        model.model.layers[1].output = early * 0.5
        late = model.model.layers[2].input
        with (model.lm_head.output[:, -1, TARGET].sum() + early.square().sum()).backward():
            halves = early.grad.save(), late.grad.save()
    assert not torch.equal(*halves)


def test_blocks_sums_and_resets_are_those_of_torch(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        hidden, logits = layer(model, LAYER), model.lm_head.output
        logits[:, 1, TARGET].sum().backward()
        first = hidden.grad.save()
        with logits[:, -1].pow(2).sum().backward():
            own = hidden.grad.save()
            again = layer(model, LAYER).grad.save()
        both = hidden.grad.save()
        hidden.grad = None
        logits[:, 3, TARGET].sum().backward()
        third = hidden.grad.save()
    run = Run(plain, IDS)
    losses = (run.logits[:, 1, TARGET].sum(), run.logits[:, -1].pow(2).sum(), run.logits[:, 3, TARGET].sum())
    grads = [torch.autograd.grad(loss, run.given[LAYER], retain_graph=True)[0] for loss in losses]
    close(first, grads[0])
    close(own, grads[1])
    close(again, grads[1])
    close(both, grads[0] + grads[1])
    close(third, grads[2])


def test_a_read_has_the_gradient_of_all_that_uses_its_tensor(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        one, two = layer(model, LAYER), layer(model, LAYER)
        loss = one.pow(2).sum() + two.sum() + model.lm_head.output[:, -1, TARGET].sum()
        with loss.backward():
            a, b = one.grad.save(), two.grad.save()
    run = Run(plain, IDS)
    hidden = run.given[LAYER]
    (expected,) = torch.autograd.grad(hidden.pow(2).sum() + hidden.sum() + run.logits[:, -1, TARGET].sum(), hidden)
    close(a, expected)
    assert torch.equal(a, b)


def test_values_before_and_behind_a_change_in_place(model: Any, plain: Any) -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    with model.trace(IDS):
        before, hidden = layer(model, LAYER), layer(model, LAYER)
        hidden[:, -1] *= vector
        with (model.lm_head.output[:, -1, TARGET].sum() + hidden.sum()).backward():
            grads = [before.grad.save(), hidden.grad.save(), layer(model, LAYER).grad.save()]
    run = Run(plain, IDS, layer2=lambda h: torch.cat([h[:, :-1], h[:, -1:] * vector], 1))
    loss = run.logits[:, -1, TARGET].sum() + run.kept[LAYER].sum()
    old, new = torch.autograd.grad(loss, [run.given[LAYER], run.kept[LAYER]])
    for ours, theirs in zip(grads, (old, new, new), strict=True):
        close(ours, theirs)
    assert (old - new).abs().max() > 0.1, "the change matters"


def test_values_that_were_assigned(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        old = layer(model, LAYER)
        new = (old * 0.5).tanh()
        model.model.layers[LAYER].output = new
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            a, b = old.grad.save(), new.grad.save()
    run = Run(plain, IDS, layer2=lambda h: (h * 0.5).tanh())
    theirs = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), [run.given[LAYER], run.kept[LAYER]])
    close(a, theirs[0])
    close(b, theirs[1])


def test_prompts_of_different_lengths_in_one_list(model: Any, plain: Any) -> None:
    with model.trace([IDS, OTHER]):
        hidden = layer(model, LAYER)
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            grad, last = hidden.grad.save(), hidden.grad.at(-1).save()
    for row, ids in enumerate((IDS, OTHER)):
        run = Run(plain, ids)
        (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), run.given[LAYER])
        close(grad[row : row + 1, -len(ids) :], expected)
        close(last[row : row + 1], expected[:, -1])
    assert not grad[1, : len(IDS) - len(OTHER)].any(), "pads have none"


def test_all_prompts_as_one_view(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke(OTHER):
            pass
        with tracer.invoke():
            hidden, loss = layer(model, LAYER), model.lm_head.output[:, -1, TARGET].sum()
            with loss.backward():
                grad = hidden.grad.save()
            given = torch.zeros(2, len(IDS), WIDTH)
            given[0] = 1
            with loss.backward():
                hidden.grad = given
                first = layer(model, 0).grad.save()
    for row, ids in enumerate((IDS, OTHER)):
        run = Run(plain, ids)
        (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), run.given[LAYER], retain_graph=True)
        close(grad[row : row + 1, -len(ids) :], expected)
        ones = torch.full_like(run.given[LAYER], 1.0 - row)
        (expected,) = torch.autograd.grad(run.given[LAYER], run.given[0], grad_outputs=ones)
        close(first[row : row + 1, -len(ids) :], expected)


def test_a_view_over_all_prompts_has_the_gradient_of_what_it_was(model: Any, plain: Any) -> None:
    """Also when the site is written and read again behind it."""
    with model.trace() as tracer:
        for ids in (IDS, OTHER):
            with tracer.invoke(ids):
                pass
        with tracer.invoke():
            before = layer(model, LAYER)
            model.model.layers[LAYER].output = before * 0.5
            behind = layer(model, LAYER)
            logits = model.lm_head.output[:, -1]
        with logits[:, TARGET].sum().backward():
            found = before.grad.save(), behind.grad.save()
    for row, ids in enumerate((IDS, OTHER)):
        run = Run(plain, ids, **{f"layer{LAYER}": lambda hidden: hidden * 0.5})
        expected = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), [run.given[LAYER], run.kept[LAYER]])
        for ours, own in zip(found, expected, strict=True):
            close(ours[row : row + 1, -len(ids) :], own)


def test_points_inside_of_attention(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        layers = model.model.layers
        z, pattern, mid = layers[LAYER].self_attn.z, layers[LAYER].self_attn.pattern, layers[LAYER].resid_mid
        called, given = layers[LAYER].self_attn.source.q_proj_0.output, layers[LAYER].self_attn.q_proj.output
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            grads = [z.grad.save(), pattern.grad.save(), mid.grad.save()]
            of_call, of_module = called.grad.save(), given.grad.save()
        values = layers[LAYER].self_attn.v.save()
    attention, kept = plain.model.layers[LAYER].self_attn, []
    hook = attention.o_proj.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    run = Run(plain, IDS)
    hook.remove()
    (of_z,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), kept[0])
    of_z = of_z.view(1, len(IDS), 4, -1)
    close(grads[0], of_z)
    repeated = values.repeat_interleave(2, 2)  # key/value heads as query heads see them
    of_pattern = torch.einsum("bqhd,bkhd->bhqk", of_z, repeated)
    seen = torch.ones(len(IDS), len(IDS)).tril().bool()
    close(grads[1] * seen, of_pattern * seen)
    assert grads[2].abs().max() > 0
    close(of_call, of_module)


@pytest.mark.parametrize("port", ["scores", "pattern", "head_out"])
def test_points_of_a_prompt_that_runs_again_for_another(port: str, model: Any) -> None:
    """A prompt is read before what is written into it is there, so it runs twice: as when that is known before."""

    def grads(patch: Any) -> list[Any]:
        with model.trace() as tracer:
            if patch is None:
                with tracer.invoke(OTHER):
                    patch = layer(model, 3)[:, -1]
            with tracer.invoke(IDS):
                first = getattr(model.model.layers[0].self_attn, port)
                before = layer(model, 0) * 1.0
                layer(model, 1)[:, -1] += patch
                logits = model.lm_head.output
            with tracer.invoke(OTHER):
                second = getattr(model.model.layers[0].self_attn, port)
                layer(model, 2)[:, 0] += before[:, -1]
                logits = logits[:, -1] + model.lm_head.output[:, -1]
            with logits[:, TARGET].sum().backward():
                return [first.grad.save(), second.grad.save()]

    with model.trace(OTHER):
        known = layer(model, 3)[:, -1].save()
    for ours, theirs in zip(grads(None), grads(known), strict=True):
        assert theirs.abs().max() > 0
        close(ours, theirs)


def test_modules_that_are_called_and_ops_of_several_results(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        hidden = layer(model, LAYER)
        lens = model.lm_head(model.model.norm(hidden))[:, -1]
        values, indices = lens.topk(3, dim=-1)
        best = torch.max(lens, dim=-1).values
        with (values.sum() + best.sum() + lens.gather(-1, indices[:, :1]).sum()).backward():
            grad, of_values = hidden.grad.save(), values.grad.save()
    run = Run(plain, IDS)
    logits = plain.lm_head(plain.model.norm(run.given[LAYER]))[:, -1]
    top, places = logits.topk(3, dim=-1)
    loss = top.sum() + logits.max(-1).values.sum() + logits.gather(-1, places[:, :1]).sum()
    (expected,) = torch.autograd.grad(loss, run.given[LAYER])
    close(grad, expected)
    close(of_values, torch.ones(1, 3))


def test_choices_hand_gradients_to_the_side_that_was_taken(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        hidden = layer(model, LAYER)
        last = hidden[:, -1]
        taken = polytrace.cond(last.norm() > 0, last * 2, last.tanh())
        with taken.sum().backward():
            grad = hidden.grad.save()
    expected = torch.zeros(1, len(IDS), WIDTH)
    expected[:, -1] = 2
    close(grad, expected)


# --- changing


def test_what_is_put_into_a_gradient_goes_on(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        first, hidden = layer(model, 0), layer(model, LAYER)
        loss = model.lm_head.output[:, -1, TARGET].sum()
        with loss.backward():
            plainly = first.grad.save()
        with loss.backward():
            hidden.grad[:, :3] = 0
            hidden.grad *= 2
            changed, before = hidden.grad.save(), first.grad.save()
        total = first.grad.save()
    run = Run(plain, IDS)
    at_layer, at_first = torch.autograd.grad(
        run.logits[:, -1, TARGET].sum(), [run.given[LAYER], run.given[0]], retain_graph=True
    )
    at_layer = at_layer * 2
    at_layer[:, :3] = 0
    (expected,) = torch.autograd.grad(run.given[LAYER], run.given[0], grad_outputs=at_layer)
    close(plainly, at_first)
    close(changed, at_layer)
    close(before, expected)
    close(total, at_first + expected)
    assert (expected - at_first).abs().max() > 0.1


def test_one_tensor_has_one_gradient_however_it_is_named(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        first, hidden = layer(model, 0), layer(model, LAYER)
        hidden[:, -1] *= 2
        loss = model.lm_head.output[:, -1, TARGET].sum()
        with loss.backward():
            hidden.grad[:, 0] = 0
            layer(model, LAYER).grad.mul_(2)
            one, two = hidden.grad.save(), layer(model, LAYER).grad.save()
            before = first.grad.save()
        (by_function,) = torch.autograd.grad(loss, [hidden])
        by_function *= 0  # a value of its own: it changes nobody's gradient
        (untouched,) = torch.autograd.grad(loss, [first])
        by_function, untouched = by_function.save(), untouched.save()
    run = Run(plain, IDS, layer2=lambda h: torch.cat([h[:, :-1], h[:, -1:] * 2], 1))
    kept = [run.kept[LAYER], run.given[0]]
    at_layer, at_first = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), kept, retain_graph=True)
    at_layer = at_layer * 2
    at_layer[:, 0] = 0
    close(one, at_layer)
    assert torch.equal(one, two)
    close(before, torch.autograd.grad(kept[0], kept[1], grad_outputs=at_layer)[0])
    assert not by_function.any()
    close(untouched, at_first)


def test_gradients_of_ops_and_brought_values_can_be_given(model: Any, plain: Any) -> None:
    with model.trace(IDS) as tracer:
        vector = tracer.value(torch.zeros(WIDTH))
        scaled = vector * 3
        layer(model, LAYER)[:, -1] += scaled
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            scaled.grad = torch.ones(WIDTH)
            grad = vector.grad.save()
    close(grad, torch.full((WIDTH,), 3.0))


def test_changes_outside_of_blocks_change_the_sum_alone(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        first, hidden, logits = layer(model, 0), layer(model, LAYER), model.lm_head.output
        logits[:, -1, TARGET].sum().backward()
        hidden.grad.mul_(0)
        untouched = first.grad.save()
        logits[:, -1, TARGET].sum().backward()
        once = hidden.grad.save()
    run = Run(plain, IDS)
    expected = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), [run.given[0], run.given[LAYER]])
    close(untouched, expected[0])
    close(once, expected[1])


# --- not differentiating


def test_detached_patterns_hand_nothing_on(model: Any, plain: Any) -> None:
    attention = plain.model.layers[LAYER].self_attn
    with model.trace(IDS):
        hidden = layer(model, LAYER - 1)
        pattern = model.model.layers[LAYER].self_attn.pattern
        model.model.layers[LAYER].self_attn.pattern = pattern.detach()
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            frozen = hidden.grad.save()
        values = pattern.save()
    rotated = attention.forward

    def by_hand(hidden_states: Tensor, **more: Any) -> tuple[Tensor, None]:
        v = attention.v_proj(hidden_states).view(1, len(IDS), 2, -1).repeat_interleave(2, 2)
        z = torch.einsum("bhqk,bkhd->bqhd", values, v)
        return attention.o_proj(z.reshape(1, len(IDS), -1)), None

    attention.forward = by_hand
    try:
        run = Run(plain, IDS)
    finally:
        attention.forward = rotated
    (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), run.given[LAYER - 1])
    close(frozen, expected)


def test_no_grad_is_detached(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        hidden = layer(model, LAYER)
        with torch.no_grad():
            weights = hidden.softmax(-1)
        with (weights * hidden).sum().backward():
            grad = hidden.grad.save()
        seen = weights.save()
    close(grad, seen)


def test_data_has_no_gradient(model: Any, plain: Any) -> None:
    with model.trace(IDS):
        hidden = layer(model, LAYER)
        with (hidden.data * hidden + model.lm_head.weight.data.sum()).sum().backward():
            ours = hidden.grad.save()
        other = layer(model, LAYER)
        held = other.data
        other *= 3
        changed = held.save()  # the same memory, as in torch
        with (held * other).sum().backward():
            behind = other.grad.save()
    hidden = Run(plain, IDS).given[LAYER].detach()
    close(ours, hidden)
    close(changed, 3 * hidden)
    close(behind, 3 * hidden)


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.data.mul_(2),
        lambda h: h.data[:, 0].zero_(),
        lambda h: h.data.__setitem__(0, 1.0),
        lambda h: h.data.__iadd__(1),
        lambda h: setattr(h, "data", h * 2),
    ],
)
def test_nothing_is_changed_in_place_through_data(change: Callable[[Any], None], model: Any) -> None:
    told = r"in-place code through `\.data`.* \(test_gradient_language\.py:\d+\)"
    with pytest.raises(GraphError, match=told), model.trace(IDS):
        change(layer(model, LAYER))


# --- tensors of one's own, and learning


def test_a_tensor_that_requires_gradients_is_trained(model: Any, plain: Any) -> None:
    ours, theirs = (torch.zeros(WIDTH, requires_grad=True) for _ in range(2))
    one, two = torch.optim.Adam([ours], lr=0.1), torch.optim.Adam([theirs], lr=0.1)
    for _ in range(3):
        with model.trace(IDS):
            layer(model, LAYER)[:, -1] += ours * 2
            (model.lm_head.output[:, -1, TARGET].sum() + ours.pow(2).sum()).backward()
        with torch.enable_grad():
            run = Run(plain, IDS, layer2=added(theirs * 2))
            (run.logits[:, -1, TARGET].sum() + theirs.pow(2).sum()).backward()
        close(ours.grad.clone(), theirs.grad.clone())  # type: ignore[union-attr]
        for optimiser in (one, two):
            optimiser.step()
            optimiser.zero_grad()
    close(ours.detach().clone(), theirs.detach().clone())
    assert ours.detach().abs().max() > 0.1


def test_a_module_of_ones_own_is_trained(model: Any, plain: Any) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    with model.trace(IDS):
        ours(layer(model, LAYER)).pow(2).mean().backward()
    with torch.enable_grad():
        theirs(Run(plain, IDS).given[LAYER].detach()).pow(2).mean().backward()
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(one.grad.clone(), two.grad.clone())  # type: ignore[union-attr]


@pytest.mark.parametrize("way", ["values", "no_grad", "without zeroing", "adam"])
def test_a_vector_is_learnt_in_one_request(way: str, model: Any, plain: Any) -> None:
    def loss_of(logits: Any) -> Any:
        return -logits[:, -1].log_softmax(-1)[:, TARGET].sum()

    with model.trace() as tracer:
        vector, losses = tracer.value(torch.zeros(WIDTH)), []
        optimiser = polytrace.optim.Adam(lr=0.1)
        for _ in range(4):
            with tracer.invoke(IDS):
                layer(model, LAYER)[:, -1] += vector
                loss = loss_of(model.lm_head.output)
            loss.backward()
            losses.append(loss)
            if way == "values":
                vector = vector - 0.1 * vector.grad
            elif way == "adam":
                (vector,) = optimiser.step([vector], [vector.grad])
            else:
                with torch.no_grad():
                    vector -= 0.1 * vector.grad
                if way == "no_grad":
                    vector.grad = None
        vector, losses = vector.save(), torch.stack(losses).save()
    theirs = torch.zeros(WIDTH, requires_grad=True)
    by_hand = torch.optim.Adam([theirs], lr=0.1) if way == "adam" else torch.optim.SGD([theirs], lr=0.1)
    expected = []
    for _ in range(4):
        with torch.enable_grad():
            loss = loss_of(Run(plain, IDS, layer2=added(theirs)).logits)
            loss.backward()
        expected.append(loss.detach())
        by_hand.step()
        if way != "without zeroing":
            by_hand.zero_grad()
    close(losses, torch.stack(expected))
    close(vector, theirs.detach().clone())
    assert losses[-1] < losses[0] - 0.01


def test_losses_of_gradients_and_of_brought_values_alone(model: Any, plain: Any) -> None:
    weights = torch.linspace(-1, 1, WIDTH)
    with model.trace(IDS) as tracer:
        hidden, brought = layer(model, LAYER), tracer.value(weights)
        model.lm_head.output[:, -1, TARGET].sum().backward()
        first = hidden.grad
        (first[:, -1] * brought).sum().backward()  # `first` is a number here: there are no gradients of gradients
        of_brought = brought.grad.save()
        brought.grad = None
        brought.pow(2).sum().backward()
        alone = brought.grad.save()
    run = Run(plain, IDS)
    (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), run.given[LAYER])
    close(of_brought, expected[0, -1])
    close(alone, 2 * weights)


def test_what_is_learnt_stays_on_the_service(model: Any, plain: Any) -> None:
    state = model.state("gradient-steps", init=torch.zeros(WIDTH))
    for _ in range(2):
        with model.session():
            with model.trace(IDS):
                layer(model, LAYER)[:, -1] += state
                loss = model.lm_head.output[:, -1, TARGET].sum()
            loss.backward()
            state.update(state.value - 0.1 * state.value.grad)
    theirs = torch.zeros(WIDTH, requires_grad=True)
    by_hand = torch.optim.SGD([theirs], lr=0.1)
    for _ in range(2):
        with torch.enable_grad():
            Run(plain, IDS, layer2=added(theirs)).logits[:, -1, TARGET].sum().backward()
        by_hand.step()
        by_hand.zero_grad()
    close(state.fetch(), theirs.detach().clone())
    state.delete()


# --- torch's functions, and what else traces have


def test_autograd_grad_and_backward(model: Any, plain: Any) -> None:
    weights = torch.linspace(-1, 1, 64).expand(1, len(IDS), 64).contiguous()
    with model.trace(IDS):
        first, hidden, logits = layer(model, 0), layer(model, LAYER), model.lm_head.output
        one, two = torch.autograd.grad(logits, [first, hidden], grad_outputs=weights)
        (both,) = torch.autograd.grad([logits[:, 0, TARGET].sum(), hidden.pow(2)], [first], [None, hidden.detach()])
        torch.autograd.backward([logits[:, 0, TARGET].sum(), logits[:, 1, TARGET].sum()])
        summed = hidden.grad.save()
        one, two, both = one.save(), two.save(), both.save()
    run = Run(plain, IDS)
    given = run.given
    expected = torch.autograd.grad(run.logits, [given[0], given[LAYER]], grad_outputs=weights, retain_graph=True)
    close(one, expected[0])
    close(two, expected[1])
    loss = run.logits[:, 0, TARGET].sum() + (given[LAYER].pow(2) * given[LAYER].detach()).sum()
    close(both, torch.autograd.grad(loss, given[0], retain_graph=True)[0])
    loss = run.logits[:, 0, TARGET].sum() + run.logits[:, 1, TARGET].sum()
    close(summed, torch.autograd.grad(loss, given[LAYER])[0])


def test_a_value_goes_from_one_prompt_to_another(model: Any, plain: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            source = layer(model, 1)
        with tracer.invoke(OTHER):
            layer(model, LAYER)[:, -1] = source[:, -1]
            with model.lm_head.output[:, -1, TARGET].sum().backward():
                grad = source.grad.save()
    donor = Run(plain, IDS)
    run = Run(plain, OTHER, layer2=lambda h: torch.cat([h[:, :-1], donor.given[1][:, -1:]], 1))
    (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), donor.given[1])
    close(grad, expected)


def test_skipped_layers_edits_and_looks(model: Any, plain: Any) -> None:
    vector = torch.linspace(-1, 1, WIDTH)
    with model.edit() as edited:
        layer(model, 1)[:, -1] += vector
    with edited.trace(IDS, peek=True):
        first = layer(model, 0)
        model.model.layers[LAYER].skip(model.model.layers[LAYER].input)
        loss = model.lm_head.output[:, -1, TARGET].sum()
        loss.backward()
        looked = float(first.grad.norm())
        grad = first.grad.save()
    run = Run(plain, IDS, layer1=added(vector))
    layers = plain.model.layers
    skipped = layers[LAYER].forward
    layers[LAYER].forward = lambda hidden_states, **more: hidden_states
    try:
        run = Run(plain, IDS, layer1=added(vector))
    finally:
        layers[LAYER].forward = skipped
    (expected,) = torch.autograd.grad(run.logits[:, -1, TARGET].sum(), run.given[0])
    close(grad, expected)
    assert looked == float(grad.norm())


def test_the_certificate_tells_shapes_of_gradients(model: Any) -> None:
    with model.trace(IDS, run=False) as tracer:
        hidden = layer(model, LAYER)
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            hidden.grad[:, -1].save()
    certificate = model.validate(tracer)
    nodes = tracer.request.graph.nodes
    shapes = dict(zip(map(type, nodes), certificate.nodes, strict=True))
    assert shapes[Backward] is None
    grad = next(shape for node, shape in zip(nodes, certificate.nodes, strict=True) if type(node).__name__ == "Grad")
    assert (grad.shape, grad.dtype) == ((1, len(IDS), WIDTH), "float32")
    assert certificate.result_bytes == WIDTH * 4


def test_what_was_overwritten_whole_has_a_gradient_of_zeros(model: Any) -> None:
    with model.trace(IDS):
        first = layer(model, 0)
        model.model.layers[LAYER].output = torch.zeros(1, len(IDS), WIDTH)
        with model.lm_head.output[:, -1, TARGET].sum().backward():
            grad = first.grad.save()
    assert not grad.any()


def test_what_the_service_refuses_names_the_line(model: Any) -> None:
    def of_another_shape() -> None:
        with model.trace(IDS):
            hidden = layer(model, LAYER)
            with model.lm_head.output[:, -1, TARGET].sum().backward():
                hidden.grad = torch.zeros(1, WIDTH)
                layer(model, 0).grad.save()

    def over_pads() -> None:
        with model.trace([IDS, OTHER]):
            hidden = layer(model, LAYER)
            with model.lm_head.output[:, -1, TARGET].sum().backward():
                hidden.grad.mean(1).save()

    def in_a_map() -> Any:
        hidden = layer(model, LAYER)
        hidden.sum().backward()
        return {"grad": hidden.grad[:, -1]}

    for program, told in (
        (lambda: model.map([IDS, OTHER], in_a_map).run(), r"a map.s prompts share its loss.*gradient_language\.py"),
        (of_another_shape, r"shape \[1, 7, 32\] cannot become one of shape \[1, 32\].*gradient_language\.py"),
        (over_pads, r"runs over the tokens of prompts of different lengths.*gradient_language\.py"),
    ):
        with pytest.raises(GraphError, match=told):
            program()
