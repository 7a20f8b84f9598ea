"""Scores as transformers' processors make them, draws that follow them, rows that do not see each other."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

import pytest
import torch
from generated import processors
from torch import Tensor

from engine.sampling import NO_TOKEN, Drawing, draw_tokens, log_likelihoods, process, uniform
from polytrace.graph import Sampling

VOCABULARY = 517
GREEDY = Sampling()
SETTINGS = [
    Sampling(do_sample=True),
    Sampling(do_sample=True, temperature=0.7),
    Sampling(do_sample=True, top_k=1),
    Sampling(do_sample=True, top_k=50),
    Sampling(do_sample=True, top_k=1000),
    Sampling(do_sample=True, top_p=0.9),
    Sampling(do_sample=True, top_p=0.0),
    Sampling(do_sample=True, min_p=0.05),
    Sampling(do_sample=True, min_p=1.0),
    Sampling(repetition_penalty=1.3),
    Sampling(do_sample=True, temperature=1.6, top_k=80, top_p=0.8, min_p=0.02, repetition_penalty=0.8),
    Sampling(do_sample=True, temperature=0.3, top_p=0.95, repetition_penalty=1.2),
]


def some_logits(rows: int, kind: str = "spread", width: int = VOCABULARY, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, width, generator=generator)
    if kind == "tied":
        return logits.round()
    return logits.bfloat16() if kind == "bf16" else logits


def some_histories(rows: int) -> list[list[int]]:
    """Of different lengths, with repeated tokens, one of them empty, and one token that the head does not have."""
    chosen = random.Random(3)
    return [[], *([VOCABULARY + 2, *chosen.choices(range(VOCABULARY), k=row * 7)] for row in range(1, rows))]


@pytest.mark.parametrize("kind", ["spread", "tied", "bf16"])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_scores_are_those_of_transformers_processors_to_the_bit(sampling: Sampling, kind: str) -> None:
    logits = some_logits(9, kind)
    histories = some_histories(9)
    given = logits.clone()
    ours = process(logits, sampling, histories)
    for row, history in enumerate(histories):
        ids = torch.tensor([history], dtype=torch.int64)
        theirs = processors(sampling)(ids, logits[row : row + 1].to(torch.float32, copy=True))
        assert torch.equal(ours[row : row + 1], theirs)
    assert ours.dtype == torch.float32 and torch.equal(logits, given)


def test_every_processor_does_something() -> None:
    logits, histories = some_logits(4), some_histories(4)
    plain = process(logits, Sampling(do_sample=True))
    for sampling in SETTINGS:
        is_idle = sampling in (SETTINGS[0], Sampling(do_sample=True, top_k=1000))
        assert torch.equal(process(logits, sampling, histories), plain) == is_idle


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    for kind in ("spread", "tied", "bf16"):
        logits = some_logits(33, kind)
        drawn = draw_tokens(logits, [Drawing(sampling=GREEDY, places=range(33), step=0)])
        assert torch.equal(drawn, logits.float().argmax(-1)) and drawn.dtype == torch.int64


def test_greedy_with_a_penalty_takes_the_likeliest_of_the_processed_scores() -> None:
    logits = some_logits(1).abs()
    first = int(logits.argmax())
    settled = Drawing(sampling=Sampling(repetition_penalty=50.0), places=[0], step=1, histories=[[first]])
    assert draw_tokens(logits, [settled]).item() == logits[0].topk(2).indices[1]


def test_a_sequence_draws_the_same_tokens_alone_and_among_any_others() -> None:
    chosen = random.Random(0)
    was = torch.get_num_threads()
    try:
        for threads, kind in itertools.product((1, 2), ("spread", "tied", "bf16")):
            torch.set_num_threads(threads)
            for num_rows in (1, 2, 7, 16, 33, 64):
                drawings = some_drawings(chosen, num_rows)
                logits = some_logits(num_rows, kind, seed=num_rows)
                together = draw_tokens(logits, drawings)
                likely = log_likelihoods(logits, together, 3)
                torch.set_num_threads(1)
                for row, alone in enumerate(each_alone(drawings)):
                    own = logits[row : row + 1]
                    assert torch.equal(draw_tokens(own, [alone]), together[row : row + 1])
                    told = log_likelihoods(own, together[row : row + 1], 3)
                    assert torch.equal(told.chosen_K, likely.chosen_K[row : row + 1])
                    assert torch.equal(told.likeliest_KC, likely.likeliest_KC[row : row + 1])
                torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(was)


def some_drawings(chosen: random.Random, num_rows: int) -> list[Drawing]:
    """Invokes of one to four sequences with settings of their own."""
    drawings = []
    while num_rows:
        size = min(num_rows, chosen.randint(1, 4))
        sampling = replace(chosen.choice([GREEDY, *SETTINGS]), seed=chosen.randrange(2**63))
        places = chosen.sample(range(20), size)
        histories = [chosen.choices(range(VOCABULARY), k=chosen.randint(1, 30)) for _ in places]
        drawings.append(Drawing(sampling=sampling, places=places, step=chosen.randrange(50), histories=histories))
        num_rows -= size
    return drawings


def each_alone(drawings: Sequence[Drawing]) -> list[Drawing]:
    return [
        replace(one, places=[place], histories=[history])
        for one in drawings
        for place, history in zip(one.places, one.histories, strict=True)
    ]


@pytest.mark.parametrize("sampling", [Sampling(do_sample=True), Sampling(do_sample=True, temperature=1.4, top_p=0.8)])
def test_frequencies_follow_the_probabilities(sampling: Sampling) -> None:
    logits = some_logits(1, width=40)
    expected = 20_000 * process(logits, sampling).softmax(-1)[0].double()
    counts = torch.zeros(40, dtype=torch.float64)
    for seed in range(20):
        places, step = range(1000), seed % 3
        drawing = Drawing(sampling=replace(sampling, seed=seed), places=places, step=step)
        counts += draw_tokens(logits.expand(1000, -1), [drawing]).bincount(minlength=40)
    assert counts[expected == 0].sum() == 0
    # Pearson's sum over tokens that are expected at least five times, the others together; Wilson and Hilferty's
    # cube root of it is nearly normal: beyond four deviations lies one of 30,000 right procedures
    is_rare = expected < 5
    cells = [*zip(counts[~is_rare], expected[~is_rare], strict=True), (counts[is_rare].sum(), expected[is_rare].sum())]
    pearson = sum(float((count - mean) ** 2 / mean) for count, mean in cells if mean > 0)
    freedom = sum(mean > 0 for _, mean in cells) - 1
    spread = 2 / (9 * freedom)
    assert abs((pearson / freedom) ** (1 / 3) - (1 - spread)) < 4 * sqrt(spread)


def test_seeds_places_and_steps_draw_apart() -> None:
    numbers = {uniform(seed, place, step) for seed in range(12) for place in range(12) for step in range(12)}
    assert len(numbers) == 12**3 and all(0 <= number < 1 for number in numbers)
    assert uniform(1, 23, 4) != uniform(12, 3, 4)


def test_a_drawn_number_is_written_down() -> None:
    """What somebody drew last year is drawn again."""
    assert uniform(0, 0, 0) == 0.251480731239616
    logits = some_logits(3)
    drawing = Drawing(sampling=Sampling(do_sample=True, seed=5), places=[0, 1, 2], step=4)
    assert draw_tokens(logits, [drawing]).tolist() == [393, 366, 438]


def test_logits_that_say_nothing_give_no_token_and_touch_no_other_row() -> None:
    logits = some_logits(8)
    drawn = Sampling(do_sample=True, top_p=0.9, top_k=20, min_p=0.1)
    settings = [GREEDY, drawn] * 4
    alone = [draw_tokens(logits[row : row + 1], one_row(settings[row])) for row in range(8)]
    broken = logits.clone()
    broken[0, 5] = torch.nan
    broken[1, 5] = torch.nan
    broken[2] = -torch.inf
    broken[3] = -torch.inf
    broken[5, 7] = torch.inf
    drawings = [drawing for sampling in settings for drawing in one_row(sampling)]
    together = draw_tokens(broken, drawings).tolist()
    assert [together[row] for row in (0, 1, 2, 3, 5)] == [NO_TOKEN] * 5
    assert [together[row] for row in (4, 6, 7)] == [alone[row].item() for row in (4, 6, 7)]


def one_row(sampling: Sampling) -> list[Drawing]:
    return [Drawing(sampling=sampling, places=[0], step=0, histories=[[1]])]


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, [1, 4]] = 0.0
    seeds = [draw_tokens(logits, one_row(Sampling(do_sample=True, seed=seed))).item() for seed in range(60)]
    assert set(seeds) == {1, 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_are_of_the_models_own_logits(dtype: torch.dtype) -> None:
    logits = some_logits(5).to(dtype)
    tokens = torch.tensor([3, 0, 516, 7, 7])
    told = log_likelihoods(logits, tokens, 4)
    wanted = logits.float().log_softmax(-1)
    assert torch.equal(told.chosen_K, wanted[torch.arange(5), tokens])
    assert torch.equal(told.likeliest_KC, wanted.sort(-1, descending=True).values[:, :4])
    assert torch.equal(wanted.gather(1, told.tokens_KC), told.likeliest_KC)
    assert log_likelihoods(logits, tokens, 0).tokens_KC.shape == (5, 0)
    assert log_likelihoods(logits, tokens, 9999).tokens_KC.shape == (5, VOCABULARY)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["spread", "tied", "bf16"])
def test_on_a_gpu_rows_draw_as_alone_and_the_host_does_not_wait(kind: str) -> None:
    drawings = some_drawings(random.Random(1), 64)
    logits = some_logits(64, kind).cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = draw_tokens(logits, drawings)
        likely = log_likelihoods(logits, together, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for row, alone in enumerate(each_alone(drawings)):
        assert torch.equal(draw_tokens(logits[row : row + 1], [alone]), together[row : row + 1])
        told = log_likelihoods(logits[row : row + 1], together[row : row + 1], 3)
        assert torch.equal(told.chosen_K, likely.chosen_K[row : row + 1])
