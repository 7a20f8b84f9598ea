"""Generations equal Hugging Face's `generate`, plain and with hooks at every step, and in company those alone."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from generated import (
    Ablate,
    Steer,
    User,
    generate_by_hand,
    ids_of,
    record,
    residual_places,
    sample_by_hand,
    serve,
    some_user,
)
from programs import get
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from width import wide

from engine.local import LocalBackend
from polytrace.graph import Sampling
from polytrace.model import Model
from scheduling.loop import step
from scheduling.scheduler import Outcome

TOLERANCE = 1e-5  # of max(1, max|plain|), in float32


class Family:
    """A family in one process beside the plain model."""

    def __init__(self, name: str, folder: Path) -> None:
        self.names = FAMILIES[name]
        self.plain = model_of(name)
        self.plain.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        self.backend = LocalBackend(str(folder), threads=1)
        self.model: Any = Model(self.backend)

    def serve(self, users: list[User], **options: Any) -> Any:
        return serve(self.model, self.backend, users, **options)

    def user(self, *prompts: tuple[int, ...], new: int = 8, **named: Any) -> User:
        return User(self.names, prompts, new, **named)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that write one or two letters, some with a space before."""
    letters = [f"{space}{letter}" for space in ("", " ") for letter in "abcdefghijklmnopqrstuvwxyz"]
    pairs = [f"{one}{other}" for one in "abcdefgh" for other in "aeiou"]
    words = ["<pad>", "<bos>", "<eos>", *letters, *pairs, "."]
    made = Tokenizer(models.BPE({word: place for place, word in enumerate(words[:96])}, [], unk_token="<pad>"))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module", params=few_of(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    made = Family(request.param, tmp_path_factory.mktemp(request.param))
    yield made
    made.backend.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    made = Family("llama", tmp_path_factory.mktemp("llama"))
    yield made
    made.backend.close()


def test_greedy_generations_are_hugging_faces_token_for_token(family: Family) -> None:
    names, chosen = family.names, random.Random(1)
    steer, ablate = Steer(names.residual(1), 5), Ablate(residual_places(names), 6)
    users = [replace(some_user(names, chosen), edits=edits) for edits in [(), (steer,), (ablate,), (steer, ablate)] * 2]
    users.append(replace(users[-1], prompts=(*users[-1].prompts, (7, 8), tuple(range(5, 45))), max_new_tokens=14))
    served = family.serve(users)
    num_moved = 0
    for user, ours in zip(users, served, strict=True):
        theirs, _ = generate_by_hand(family.plain, user)
        assert ids_of(ours) == theirs
        assert {one.finish for one in ours} == {"length"}
        num_moved += bool(user.edits) and generate_by_hand(family.plain, user.without_edits())[0] != theirs
        assert family.serve([user]) == [ours]
    assert num_moved >= 5, "edits decide which tokens come"


def test_logits_of_every_step_are_hugging_faces(family: Family) -> None:
    """And so are log-probabilities, which are of the logits before they are processed."""
    user = family.user((5, 9, 33), (8, 41, 7, 12, 13, 60, 2), edits=(Steer(family.names.residual(2), 3),))
    with family.model.generate([*map(list, user.prompts)], max_new_tokens=8, eos=None, logprobs=3) as tracer:
        with tracer.all():
            user.edits[0].change(get(family.model, user.edits[0].place))
            kept = family.model.output.logits[:, -1].save()
        result = tracer.result
    theirs, logits = generate_by_hand(family.plain, user)
    assert [one.ids for one in result] == theirs
    ours = kept.stack()
    assert ours.shape == (8, 2, family.names.vocabulary)
    for sequence, wanted in enumerate(logits):
        close(ours[:, sequence], wanted)
        logs = wanted.log_softmax(-1)
        close(torch.tensor(result[sequence].logprobs), logs.gather(1, torch.tensor(theirs[sequence])[:, None])[:, 0])
        likeliest = result[sequence].likeliest
        close(torch.tensor([[log for _, log in each] for each in likeliest]), logs.topk(3).values)
        assert [[token for token, _ in each] for each in likeliest] == logs.topk(3).indices.tolist()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max()))


DRAWN = [
    Sampling(do_sample=True, seed=1),
    Sampling(do_sample=True, temperature=0.6, top_k=20, seed=2),
    Sampling(do_sample=True, top_p=0.8, repetition_penalty=1.4, seed=3),
    Sampling(do_sample=True, temperature=1.5, min_p=0.05, top_p=0.95, top_k=30, repetition_penalty=0.8, seed=2**62),
    Sampling(repetition_penalty=1.7),
]


@pytest.mark.parametrize("family", ["llama", wide("gpt2"), "gemma2", wide("mixtral")], indirect=True)
def test_drawn_tokens_are_those_of_transformers_processors_and_the_written_down_numbers(family: Family) -> None:
    chosen = random.Random(2)
    users = [replace(some_user(family.names, chosen), sampling=sampling) for sampling in DRAWN]
    for user, ours in zip(users, family.serve(users), strict=True):
        assert ids_of(ours) == sample_by_hand(family.plain, user)
        assert family.serve([user]) == [ours]


def test_samples_of_a_prompt_draw_apart_and_share_what_they_have_in_common(llama: Family) -> None:
    prompt = tuple(range(3, 43))
    user = llama.user(prompt, sampling=DRAWN[0], edits=(Steer(llama.names.residual(1), 5),))
    (ours,) = llama.serve([user], n=5)
    assert ids_of(ours) == sample_by_hand(llama.plain, replace(user, prompts=(prompt,) * 5))
    assert len(set(ids_of(ours))) > 2
    assert llama.serve([user], n=5, sharing="off") == [ours]


def test_equal_prompts_of_several_users_draw_and_force_apart(llama: Family) -> None:
    """Their rows of logits are the same ones; what is made of them is each one's own."""
    prompt = (5, 9, 33, 20, 21)
    users = [llama.user(prompt, (7, 7), sampling=Sampling(do_sample=True, seed=seed)) for seed in (1, 2, 3)]
    users.append(llama.user(prompt))
    alone = [llama.serve([user])[0] for user in users]
    assert len({ids_of(one)[0] for one in alone}) > 2
    assert llama.serve(users) == alone

    tracers = [record(llama.model, user, run=False) for user in users]
    with llama.model.generate([[*prompt]], max_new_tokens=8, eos=None, run=False) as forcing:
        for number in forcing.iter[:3]:
            forcing.token[:] = 40 + number
    programs = [llama.backend.work_out(tracer.built_request()) for tracer in (tracers[3], forcing, *tracers[:3])]
    greedy, forced, *drawn = [list(outcome.receipt.generated) for outcome in llama.backend.run_together(programs)]
    assert [greedy, *drawn] == [alone[3], *alone[:3]]
    assert forced[0].ids[:3] == (40, 41, 42)
    ((theirs,), _) = generate_by_hand(
        llama.plain, replace(users[3], prompts=((*prompt, 40, 41, 42),), max_new_tokens=5)
    )
    assert forced[0].ids[3:] == theirs


def test_a_generation_whose_logits_say_nothing_fails_alone(llama: Family) -> None:
    prompt = (5, 9, 33, 20, 21)
    users = [llama.user(prompt, sampling=sampling) for sampling in (Sampling(), DRAWN[1])]
    alone = [llama.serve([user])[0] for user in users]
    with llama.model.generate([[*prompt]], max_new_tokens=8, eos=None, run=False) as broken:
        for _ in broken.iter[3]:
            llama.model.lm_head.output[:, -1] = float("nan")
    tracers = [broken, *[record(llama.model, user, run=False) for user in users]]
    first, *others = llama.backend.run_together([llama.backend.work_out(one.built_request()) for one in tracers])
    assert first.error is not None
    assert "step 3 of prompt 0: its logits say nothing of the next token" in first.error.message
    assert [list(outcome.receipt.generated) for outcome in others] == alone


def test_a_forced_token_is_told_with_its_own_log_probability(llama: Family) -> None:
    with llama.model.generate([[5, 9, 33]], max_new_tokens=3, eos=None, logprobs=1) as tracer:
        logits = llama.model.lm_head.output[:, -1].save()
        tracer.token[:] = 50
        result = tracer.result
    assert result.ids[0] == 50 != result.likeliest[0][0][0]
    close(torch.tensor(result.logprobs[:1]), logits.log_softmax(-1)[:, 50])


def test_a_name_may_stand_for_a_value_of_an_earlier_generation(llama: Family) -> None:
    for _ in range(2):
        with llama.model.generate([[5, 6]], max_new_tokens=2, eos=None) as tracer, tracer.all():
            hidden = llama.model.model.layers[1].output.save()
        assert [tuple(value.shape) for value in hidden] == [(1, 2, 32), (1, 1, 32)]


def test_drawn_tokens_are_as_frequent_as_hugging_faces(llama: Family) -> None:
    """Two samples of one distribution over pairs of tokens: the first two that are drawn."""
    prompt, options = (5, 9, 33, 20), {"temperature": 0.5, "top_k": 8}
    user = llama.user(prompt, new=2, sampling=Sampling(do_sample=True, seed=11, **options))
    (ours,) = llama.serve([user], n=1000)
    torch.manual_seed(0)
    theirs, _ = generate_by_hand(
        llama.plain, replace(user, prompts=(prompt,) * 1000), do_sample=True, top_p=1.0, **options
    )
    mine, other = Counter(ids_of(ours)), Counter(theirs)
    often = [pair for pair in mine | other if mine[pair] + other[pair] >= 20]
    # each difference of two counts has the variance of their sum, so the sum of squares has a mean of one a pair
    pearson = sum((mine[pair] - other[pair]) ** 2 / (mine[pair] + other[pair]) for pair in often)
    assert len(often) >= 8
    assert pearson < len(often) + 4 * (2 * len(often)) ** 0.5
    assert sum(mine[pair] for pair in often) > 600


def test_a_sequence_ends_at_its_end_token_and_others_go_on(llama: Family) -> None:
    user = llama.user((5, 9, 33), (8, 41, 7, 12, 13, 60, 2), (70, 71), new=16)
    ((*whole,),) = (ids_of(llama.serve([user])[0]),)
    ends = [whole[0][4], whole[2][9]]
    (ours,) = llama.serve([user], eos=ends)
    theirs, _ = generate_by_hand(llama.plain, user, eos=ends)
    assert ids_of(ours) == theirs
    assert [one.finish for one in ours] == ["eos" if ids[-1] in ends else "length" for ids in theirs]
    assert len({len(ids) for ids in theirs}) > 1 and ours[0].finish == "eos"


def test_a_sequence_ends_at_a_stop_text_as_hugging_faces_does(llama: Family) -> None:
    user = llama.user((5, 9, 33), (8, 41, 7, 12, 13, 60, 2), new=20)
    whole = ids_of(llama.serve([user])[0])
    text = tokenizer().decode(list(whole[0]))
    for stop in (text[5:8], text[2:4], text[9:10], "nobody writes this"):
        (ours,) = llama.serve([user], stop=[stop])
        for place, prompt in enumerate(user.each_prompt()):
            ((theirs,), _) = generate_by_hand(llama.plain, prompt, stop_strings=[stop], tokenizer=tokenizer())
            assert ours[place].ids == theirs
            assert ours[place].finish == ("stop" if len(theirs) < 20 else "length")


def test_crowds_that_come_and_go_at_any_time_get_what_each_gets_alone(llama: Family) -> None:
    """24 requests with programs of their own arrive while others run, and some are cancelled on their way."""
    chosen = random.Random(3)
    backend, scheduler = llama.backend, llama.backend.scheduler
    users = [some_user(llama.names, chosen, most_tokens=24) for _ in range(24)]
    users = [replace(user, sampling=chosen.choice([Sampling(), *DRAWN])) for user in users]
    alone = [llama.serve([user])[0] for user in users]
    programs = [backend.work_out(record(llama.model, user, run=False).built_request()) for user in users]
    come = {program.request: chosen.randrange(30) for program in programs}
    leave = {program.request: come[program.request] + chosen.randrange(1, 6) for program in programs[::4]}
    outcomes: dict[str, Outcome] = {}
    told: dict[str, list[Any]] = {program.request: [] for program in programs}
    turn = 0
    while len(outcomes) < len(programs):
        for program in programs:
            if come[program.request] == turn:
                scheduler.add(program)
            if leave.get(program.request) == turn:
                scheduler.cancel(program.request)
        step(scheduler, backend.shards)
        for progress in scheduler.take_progress():
            told[progress.request] += progress.tokens
        for outcome in scheduler.take_outcomes():
            outcomes[outcome.request] = outcome
            told[outcome.request] += outcome.tokens
        turn += 1
        assert turn < 2000
    num_left = 0
    for program, wanted in zip(programs, alone, strict=True):
        outcome = outcomes[program.request]
        if outcome.error is not None:
            assert program.request in leave and outcome.error.code == "cancelled"
            num_left += 1
            continue
        assert list(outcome.receipt.generated) == wanted
        by_sequence = [
            tuple(one.id for one in told[program.request] if one.sequence == at) for at in range(len(wanted))
        ]
        assert by_sequence == ids_of(wanted)
    assert num_left >= 3
    scheduler.forget_prefixes()
    while scheduler.has_work():  # shards hear of what has ended in the next pass
        step(scheduler, backend.shards)
    assert backend.shard.store.held_bytes == 0


def test_threads_that_generate_at_any_time_share_passes_and_get_what_each_gets_alone(llama: Family) -> None:
    chosen = random.Random(4)
    users = [replace(some_user(llama.names, chosen), sampling=chosen.choice([Sampling(), *DRAWN])) for _ in range(12)]
    alone = [ids_of(llama.serve([user])[0]) for user in users]

    def run(user: User) -> Any:
        time.sleep(random.Random(user.prompts[0][0]).random() / 10)
        return record(llama.model, user)

    with ThreadPoolExecutor(len(users)) as threads:
        tracers = list(threads.map(run, users))
    assert [[one.ids for one in tracer.result] for tracer in tracers] == alone
    assert max(entry.requests for tracer in tracers for entry in tracer.receipt.passes) > 1
