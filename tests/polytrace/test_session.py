"""Several traces as one request, and loops in it: against hooks and torch written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import IDS, OTHER, VOCABULARY, WIDTH, at_last, close, hooked, loaded, small_llama
from torch import Tensor

from polytrace.errors import GraphError, TooLargeError
from polytrace.wire import encode_request


@pytest.fixture(scope="module")
def plain() -> Any:
    return small_llama()


@pytest.fixture(scope="module")
def model(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with loaded(plain, tmp_path_factory.mktemp("llama")) as made:
        yield made


def patched(model: Any, **options: Any) -> tuple[Any, list[Any]]:
    """A layer's last row of one trace put into an earlier layer of the next."""
    with model.session(**options) as session:
        with model.trace(IDS):
            row = model.model.layers[3].output[0][:, -1]
            saved = [row.save()]
        with model.trace(OTHER):
            model.model.layers[1].output[0][:, -1] = row
            saved.append(model.lm_head.output[:, -1].save())
    return session, saved


def test_values_of_a_trace_are_used_in_later_ones_and_nothing_but_saves_moves(plain: Any, model: Any) -> None:
    session, (row, logits) = patched(model)
    theirs = hooked(plain, IDS)[1]["model.layers.3"][:, -1]

    def patch(hidden: Tensor) -> Tensor:
        hidden[:, -1] = theirs
        return hidden

    close(row, theirs)
    close(logits, hooked(plain, OTHER, {"model.layers.1": patch})[0][:, -1])
    assert (logits - hooked(plain, OTHER)[0][:, -1]).abs().max() > 0.1
    assert len(session.receipt.passes) == 2  # the value is needed at an earlier layer than it comes from
    assert session.receipt.result_bytes == row.nbytes + logits.nbytes
    assert all(trace.receipt is session.receipt for trace in session.traces)


def test_a_session_merged_with_others_has_the_bits_that_it_has_alone(model: Any) -> None:
    sessions = [patched(model, run=False)[0] for _ in range(2)]
    with model.trace([OTHER, IDS], run=False) as neighbour:
        model.model.layers[2].output[0][:] *= 0.5
        model.lm_head.output.save()
    backend = model.backend
    requests = [each.request for each in (sessions[0], neighbour, sessions[1])]
    first, _, last = backend.run_together([backend.work_out(request) for request in requests])
    assert first.receipt.passes[0].requests == 3
    (alone,) = backend.run_together([backend.work_out(requests[0])])
    for name, value in alone.values.items():
        assert torch.equal(first.values[name], value)
        assert torch.equal(last.values[name], value)


def test_traces_that_exchange_nothing_run_in_one_pass(plain: Any, model: Any) -> None:
    with model.session() as session:
        with model.trace(IDS) as tracer:
            first = model.lm_head.output[:, -1].save()
            assert tracer.lengths == (len(IDS),)
        with model.trace() as tracer:
            with tracer.invoke(OTHER):
                second = model.lm_head.output[:, -1].save()
            with tracer.invoke(IDS[:3]):
                third = model.lm_head.output[:, -1].save()
            assert tracer.lengths == (len(OTHER), 3)
        both = (first + second).save()
    assert len(session.receipt.passes) == 1
    for ours, ids in ((first, IDS), (second, OTHER), (third, IDS[:3])):
        close(ours, hooked(plain, ids)[0][:, -1])
    assert torch.equal(both, first + second)


def test_saved_values_are_no_data_before_the_session_ends(model: Any) -> None:
    with model.session():
        with model.trace(IDS):
            norm = model.model.layers[1].output[0].norm().save()
        with pytest.raises(GraphError, match=r"this session sends when its block ends.*float\(\)"):
            float(norm)
        with pytest.raises(GraphError, match="this session sends when its block ends"):
            assert norm > 3
    assert float(norm) > 0


def test_in_place_code_on_an_earlier_traces_value_changes_the_value_and_not_its_run(plain: Any, model: Any) -> None:
    with model.session():
        with model.trace(IDS):
            hidden = model.model.layers[1].output[0]
            logits = model.lm_head.output.save()
        hidden[:, 0] = 7.0
        changed = hidden.save()
    theirs = hooked(plain, IDS)
    close(logits, theirs[0])
    close(changed[:, 1:], theirs[1]["model.layers.1"][:, 1:])
    assert (changed[:, 0] == 7.0).all()


@pytest.mark.parametrize("option", [{"seed": 3}, {"sharing": "off"}, {"run": False}, {"peek": True}])
def test_an_option_that_is_not_the_sessions_is_refused(model: Any, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(GraphError, match=rf"model.session\({name}="), model.session(), model.trace(IDS, **option):
        pass


def test_an_option_that_is_the_sessions_is_taken(model: Any) -> None:
    def noise(seed: int) -> Tensor:
        with model.session(seed=seed) as session:
            with model.trace(IDS, seed=seed):
                drawn = [torch.randn_like(model.model.layers[0].output[0][:, -1]).save()]
            with model.trace(IDS):
                drawn.append(torch.randn_like(model.model.layers[0].output[0][:, -1]).save())
        assert session.request.options.seed == seed
        return torch.stack(drawn)

    first = noise(4)
    assert torch.equal(first, noise(4))
    assert not torch.equal(first[0], first[1])  # each is a draw of its own
    assert not torch.equal(first, noise(5))


def test_a_session_with_a_trace_that_failed_is_not_sent(model: Any) -> None:
    with pytest.raises(GraphError, match=r"ended with ValueError; a session is sent whole"), model.session():
        with pytest.raises(ValueError, match="mine"), model.trace(IDS):
            model.lm_head.output.save()
            raise ValueError("mine")
        with model.trace(OTHER):
            model.lm_head.output.save()


def test_what_a_session_cannot_hold_is_told(model: Any) -> None:
    with pytest.raises(GraphError, match=r"a session has traces.*model.trace\(prompts\)"), model.session() as session:
        session.invoke(IDS)
    with pytest.raises(GraphError, match="a trace is open already"), model.session(), model.session():
        pass
    with model.session(run=False) as session:
        with model.trace(IDS) as tracer:
            model.lm_head.output.save()
            with pytest.raises(GraphError, match=r"model.validate\(session\)"):
                model.validate(tracer)
        later = model.trace(IDS)
    with pytest.raises(GraphError, match="a session whose block has ended"), later:
        pass
    assert model.validate(session).passes == 1


def test_a_loop_carries_a_vector_from_run_to_run(plain: Any, model: Any) -> None:
    """Soft-prompt-like: each step writes what the steps before have summed up, and adds what it sees behind."""
    steps = 5
    with model.session() as session:
        state: Any = torch.zeros(WIDTH)
        for step in session.repeat(steps):
            with model.trace(IDS):
                model.model.layers[0].output[0][:, -1] += state
                state = state + 0.1 * model.model.layers[2].output[0][:, -1].squeeze(0) / (step + 1)
        state.save()
    theirs = torch.zeros(WIDTH)
    for step in range(steps):
        _, seen = hooked(plain, IDS, {"model.layers.0": at_last(theirs)})
        theirs = theirs + 0.1 * seen["model.layers.2"][:, -1].squeeze(0) / (step + 1)
    close(state, theirs)
    assert len(session.receipt.passes) == steps
    independent = sum(0.1 * hooked(plain, IDS)[1]["model.layers.2"][0, -1] / (step + 1) for step in range(steps))
    assert (theirs - independent).abs().max() > 0.1


def test_a_probe_trained_over_batches_is_the_one_that_torch_trains(plain: Any, model: Any) -> None:
    """Ridge and logistic regression of the residual stream by gradient steps that are written by hand."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        prompts = torch.randint(0, VOCABULARY, (4, 6), generator=generator)
        batches.append((prompts, torch.randint(0, 2, (4,), generator=generator).float()))
    steps, rate, decay = 12, 0.05, 0.01

    def step_of(x: Any, target: Tensor, ridge: Any, logistic: Any) -> tuple[Any, Any]:
        ridge = ridge - rate * (x.T @ (x @ ridge - target) / 4 + decay * ridge)
        logistic = logistic - rate * (x.T @ (torch.sigmoid(x @ logistic) - target) / 4)
        return ridge, logistic

    ridge: Any = torch.zeros(WIDTH)
    logistic: Any = torch.zeros(WIDTH)
    with model.session() as session:
        for _, (prompts, target) in session.repeat(steps, data=batches):
            with model.trace(prompts):
                x = model.model.layers[2].output[0][:, -1]
            ridge, logistic = step_of(x / 4, target, ridge, logistic)
        ridge.save()
        logistic.save()
    by_hand: tuple[Any, Any] = (torch.zeros(WIDTH), torch.zeros(WIDTH))
    for step in range(steps):
        prompts, target = batches[step % 3]
        x = torch.cat([hooked(plain, row)[1]["model.layers.2"][:, -1] for row in prompts.tolist()])
        by_hand = step_of(x / 4, target, *by_hand)
    close(ridge, by_hand[0])
    close(logistic, by_hand[1])
    assert by_hand[1].abs().max() > 0.1
    assert len(session.receipt.passes) == 1  # activations do not depend on the probes


def test_equal_steps_are_written_once_on_the_wire(model: Any) -> None:
    def size(steps: int) -> int:
        with model.session(run=False) as session:
            state: Any = torch.zeros(WIDTH)
            for _ in session.repeat(steps):
                with model.trace(IDS):
                    model.model.layers[1].output[0][:, -1] += state
                    state = state + torch.randn_like(model.model.layers[3].output[0][:, -1].squeeze(0))
            state.save()
        assert len(session.request.graph.nodes) > 8 * steps
        return sum(map(len, encode_request(session.request)))

    assert size(100) < size(10) + 100


def test_a_loop_is_bounded_with_the_number_of_steps_that_fit(model: Any) -> None:
    whole = model.description
    model.__dict__["description"] = replace(whole, limits=replace(whole.limits, max_nodes=100))
    try:
        told = "60 steps of 4 nodes .* the 100 .* at most 25 steps fit"
        with pytest.raises(TooLargeError, match=told) as caught, model.session() as session:
            total: Any = 0.0
            for _ in session.repeat(60):
                with model.trace(IDS):
                    total = total + model.lm_head.output[:, -1].sum()
        assert str(caught.value.where).startswith("test_session.py:")
    finally:
        model.__dict__["description"] = whole
    with pytest.raises(GraphError, match="1 or more, not 0"), model.session() as session:
        session.repeat(0)
    with pytest.raises(GraphError, match="data of this loop is empty"), model.session() as session:
        session.repeat(3, data=[])
    with pytest.raises(TooLargeError, match="more than the"), model.session() as session:
        session.repeat(10_000_000)
