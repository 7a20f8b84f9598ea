"""Generations over stages and ranks: what goes from step to step between them, who fails, and who works meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from generation_by_hand import run_by_hand
from generation_programs import (
    LAST,
    LOGITS,
    TOKEN,
    Add,
    Block,
    Ending,
    Favour,
    Look,
    Mix,
    Program,
    SeeToken,
    Shift,
    Statement,
    StopAt,
    Take,
    Writer,
    written,
)
from processes import ProcessBackend, ProcessShards
from programs import difference
from width import wide

from engine.local import LocalBackend
from polytrace.errors import RunError
from polytrace.graph import Carried, Generation, Invoke, Request, Sampling, name_at
from scheduling.plan import Plan
from scheduling.policy import PassPolicy
from scheduling.scheduler import Outcome, Scheduler

FAMILY = FAMILIES["llama"]
FLOAT32_TOLERANCE = 1e-5  # of max(1, max|plain|)
EVERYONE = PassPolicy(budget_tokens=1 << 20, max_members=1000)
FIRST, LAST_LAYER = FAMILY.residual(0), FAMILY.residual(3)
PROMPT, OTHER = (3, 17, 42, 5, 9), tuple(range(7, 43))
STEPS = 5


@dataclass
class Grid:
    """Shards of a tiny model."""

    stages: int
    ranks: int
    backend: Any

    def run(self, *requests: Request) -> list[Outcome]:
        outcomes: list[Outcome] = self.backend.run_together([self.backend.work_out(request) for request in requests])
        return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model_of("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[wide((1, 1)), (2, 1), (2, 2)], ids=lambda grid: "x".join(map(str, grid)))
def grid(request: pytest.FixtureRequest, folder: Path) -> Iterator[Grid]:
    stages, ranks = request.param
    if stages == 1:
        yield Grid(1, 1, LocalBackend(str(folder), threads=1, policy=EVERYONE))
        return
    shards = ProcessShards(str(folder), stages=stages, ranks=ranks)
    yield Grid(stages, ranks, ProcessBackend(str(folder), shards, folder, EVERYONE))
    shards.close()


def greedy(*prompts: tuple[int, ...], steps: int = STEPS, **more: Any) -> Invoke:
    return Invoke(sequences=prompts, generation=Generation(max_new_tokens=steps, **more))


def program(*blocks: Block, invokes: tuple[Invoke, ...], endings: tuple[Ending, ...] = ()) -> Program:
    return Program(FAMILY, invokes, blocks, endings)


def loop(*statements: Statement, invoke: int = 0, steps: range = range(STEPS)) -> Iterator[Block]:
    """The same at each step; values that it takes are numbered by step."""
    for step in steps:
        yield Block(step, invoke, tuple(_at(statement, step) for statement in statements))


def _at(statement: Statement, step: int) -> Statement:
    if isinstance(statement, Take):
        return Take(100 * statement.slot + step, statement.place)
    if isinstance(statement, Look):
        return Look(statement.place, f"{statement.name}{step}")
    return statement


def there_and_back() -> Program:
    """What the first layer has goes to the last one a step later, and what that has goes back; both far."""
    blocks = []
    for step in range(STEPS):
        own: list[Statement] = [Take(step, FIRST), Take(100 + step, LAST_LAYER)]
        if step:
            own += [Add(LAST_LAYER, step - 1), Add(FIRST, 100 + step - 1)]
        if step > 2:  # from further back than one step
            own.append(Add(FAMILY.residual(2), 100 + step - 3))
        blocks.append(Block(step, 0, (*own, Look(FIRST, f"first{step}"), Look(LAST_LAYER, f"last{step}"))))
    return program(*blocks, invokes=(greedy(PROMPT),))


def sums() -> Program:
    """A sum over the steps of what two stages have, used at the end of each and behind the loop."""
    blocks = []
    for step in range(STEPS):
        own: list[Statement] = [Take(10 + step, FIRST), Take(30 + step, LAST_LAYER)]
        before = 50 + step - 1 if step else 30
        own += [Mix(50 + step, (before, 10 + step)), Mix(70 + step, (50 + step, 30 + step))]
        if step:
            own.append(Add(FAMILY.residual(1), 70 + step - 1))
        blocks.append(Block(step, 0, tuple(own)))
    endings = (
        Ending("first", tuple(range(10, 10 + STEPS)), is_stack=True),
        Ending("last", tuple(range(30, 30 + STEPS)), is_stack=True),
        Ending("both", (10, 31, 52, 73), is_stack=True),
        Ending("sum", tuple(range(70, 70 + STEPS)), is_stack=False),
    )
    return program(*blocks, invokes=(greedy(PROMPT, OTHER),), endings=endings)


def between() -> Program:
    """At each step values of one invoke go into another, of another length, from late layers into early ones."""
    blocks = []
    for step in range(STEPS):
        blocks.append(Block(step, 0, (Take(step, LAST_LAYER), Look(LAST_LAYER, f"from{step}"))))
        blocks.append(Block(step, 1, (Add(FIRST, step), Look(LAST_LAYER, f"to{step}"), SeeToken(f"token{step}"))))
    return program(*blocks, invokes=(greedy(PROMPT), greedy(OTHER, PROMPT)))


def drawn() -> Program:
    """Samples of one prompt, with edits at every step."""
    sampling = Sampling(do_sample=True, temperature=1.3, top_k=30, repetition_penalty=1.1, seed=5)
    blocks = loop(Add(FAMILY.residual(1), seed=1), Favour(40), SeeToken("t"), steps=range(1, STEPS))
    named = [Block(b.step, 0, (*b.statements[:2], SeeToken(f"t{b.step}"))) for b in blocks]
    return program(*named, invokes=(greedy(OTHER, OTHER, OTHER, sampling=sampling, logprobs=2),))


def stopped() -> Program:
    """Tokens that are changed, and sequences that end by their values while others go on."""
    blocks = [Block(step, 0, (Shift(step + 1), StopAt(3), SeeToken(f"t{step}"))) for step in range(STEPS)]
    return program(*blocks, invokes=(greedy(PROMPT, OTHER, OTHER[:7], OTHER[3:20]),))


def ended_early(eos: tuple[int, ...]) -> Program:
    """One invoke ends before the other, which wants its values, and a list of both."""
    blocks = []
    for step in range(STEPS):
        blocks.append(Block(step, 0, (Take(step, FIRST), Look(LAST_LAYER, f"short{step}"))))
        blocks.append(Block(step, 1, (Add(FAMILY.residual(1), step), Take(100 + step, LAST_LAYER))))
    slots = tuple(slot for step in range(STEPS) for slot in (step, 100 + step))
    endings = (
        Ending("list", slots, is_stack=True),
        Ending("short", tuple(range(STEPS)), is_stack=False),
        Ending("long", tuple(range(100, 100 + STEPS)), is_stack=False),
    )
    return program(*blocks, invokes=(greedy(PROMPT, eos=eos), greedy(OTHER)), endings=endings)


def generated(outcome: Outcome) -> dict[tuple[int, int], tuple[tuple[int, ...], str]]:
    assert outcome.error is None and outcome.receipt is not None, outcome.error
    return {(one.invoke, one.sequence): (one.ids, one.finish) for one in outcome.receipt.generated}


def same_bits(one: Outcome, other: Outcome) -> bool:
    return (
        generated(one) == generated(other)
        and one.values.keys() == other.values.keys()
        and all(torch.equal(value, other.values[name]) for name, value in one.values.items())
    )


def test_values_go_from_step_to_step_between_stages_and_tokens_are_hugging_faces(grid: Grid, folder: Path) -> None:
    plain = model_of("llama")
    second = run_by_hand(plain, program(invokes=(greedy(PROMPT),))).generated[0, 0][0][1]
    early = ended_early((second,))
    users = [there_and_back(), sums(), between(), drawn(), stopped(), early]
    merged = grid.run(*map(written, users))
    one = Grid(1, 1, LocalBackend(str(folder), threads=1, policy=EVERYONE)).run(*map(written, users))
    for user, ours, theirs in zip(users, merged, one, strict=True):
        by_hand = run_by_hand(plain, user)
        assert generated(ours) == by_hand.generated
        assert ours.values.keys() == by_hand.values.keys()
        names = list(by_hand.values)
        assert difference([ours.values[name] for name in names], [by_hand.values[name] for name in names]) <= (
            FLOAT32_TOLERANCE
        )
        assert same_bits(ours, grid.run(written(user))[0])
        assert grid.ranks > 1 or same_bits(ours, theirs)  # stages change no bit
        if user is not early:
            continue
        assert by_hand.generated[0, 0] == ((*by_hand.generated[0, 0][0][:1], second), "eos")
        assert ours.values["list"].shape == (STEPS + 2, FAMILY.width)  # two steps of one, all of the other
        assert name_at("short3", 3) not in ours.values
    told = [
        [(one.logprobs, one.likeliest) for one in outcome.receipt.generated]
        for outcome in (merged[3], one[3])
        if outcome.receipt is not None
    ]
    assert all(logprobs and len(likeliest) == STEPS for logprobs, likeliest in told[0])
    if grid.ranks == 1:
        assert told[0] == told[1]


def test_users_of_one_prompt_see_and_change_their_own_tokens(grid: Grid) -> None:
    """They have one row of the logits in common at first, and the same lines at every step."""
    users = []
    for seed in range(4):
        shift = (Shift(seed),) if seed else ()
        blocks = [Block(step, 0, (SeeToken(f"drawn{step}"), *shift, SeeToken(f"new{step}"))) for step in range(STEPS)]
        sampling = Sampling(do_sample=True, temperature=1.5, seed=seed)
        users.append(program(*blocks, invokes=(greedy(OTHER, OTHER, PROMPT, sampling=sampling),)))
    seen = set()
    for place, (user, ours) in enumerate(zip(users, grid.run(*map(written, users)), strict=True)):
        assert same_bits(ours, grid.run(written(user))[0])
        new = torch.stack([ours.values[name_at(f"new{step}", step)] for step in range(STEPS)], 1)
        old = torch.stack([ours.values[name_at(f"drawn{step}", step)] for step in range(STEPS)], 1)
        assert [tuple(row) for row in new.tolist()] == [ids for ids, _ in generated(ours).values()]
        assert torch.equal(new, (old + place) % 96)
        seen.update(map(tuple, new.tolist()))
    assert len(seen) > 8  # of 12


def test_what_is_carried_waits_on_the_stage_that_made_it(grid: Grid) -> None:
    compiled = grid.backend.work_out(written(there_and_back()))
    homes = {node.stage for part in compiled.chain.parts for node in part.graph.nodes if isinstance(node, Carried)}
    assert homes == set(range(grid.stages))
    moves = {
        (move.source, move.target)
        for part in compiled.chain.parts
        for wave in part.waves
        for work in wave.stages
        for move in work.held
    }
    assert moves == (set() if grid.stages == 1 else {(0, 1), (1, 0)})


def failing(step: int) -> Request:
    """Looks a token up in a table that is too short, at one step."""
    writer = Writer()
    table = writer.constant(torch.zeros(2, 4))
    writer.step = step
    token = writer.op("getitem", writer.read(TOKEN), LAST)
    writer.save(writer.op("index_select", table, 0, writer.op("add", token, 2)), "row")
    return writer.request([greedy(PROMPT)])


def nan_at(step: int) -> Request:
    """Logits that say nothing, at one step."""
    writer = Writer()
    writer.step = step
    seen = writer.read(LOGITS)
    writer.write(LOGITS, writer.op("mul", seen, float("nan")))
    return writer.request([greedy(PROMPT)])


def token_at(step: int, value: int) -> Request:
    writer = Writer()
    writer.step = step
    seen = writer.read(TOKEN)
    writer.write(TOKEN, writer.op("setitem", seen, LAST, value))
    return writer.request([greedy(PROMPT)])


def failing_early(step: int) -> Request:
    """On the first stage, while later ones wait for what it was to send."""
    writer = Writer()
    table = writer.constant(torch.zeros(2, FAMILY.width))
    first = writer.op("getitem", writer.read(TOKEN), LAST)
    writer.step = step
    row = writer.op("index_select", table, 0, writer.op("add", first, 2))
    for layer in ("model.layers.0", "model.layers.3"):
        where = type(TOKEN)(module=layer, port=LOGITS.port)
        seen = writer.read(where)
        writer.write(where, writer.op("setitem", seen, LAST, row))
    return writer.request([greedy(PROMPT)])


@pytest.mark.parametrize("step", [0, 2])
def test_a_request_that_fails_at_a_step_fails_alone_and_says_where(grid: Grid, step: int) -> None:
    users = [there_and_back(), between(), sums()]
    undisturbed = grid.run(*map(written, users))
    wrong = [failing(step), nan_at(step), token_at(step, 96), token_at(step, -3)]
    if step:
        wrong.append(failing_early(step))
    requests = [written(users[0]), *wrong[:2], written(users[1]), *wrong[2:], written(users[2])]
    outcomes = grid.run(*requests)
    fine = [outcomes[0], outcomes[3], outcomes[-1]]
    assert all(map(same_bits, fine, undisturbed))
    errors = [outcome.error for outcome in (*outcomes[1:3], *outcomes[4:-1])]
    assert all(isinstance(error, RunError) for error in errors), errors
    assert errors[0] is not None and errors[0].where == "program.py:5"
    assert "NaN" in str(errors[1])
    assert "96; ids are 0-95" in str(errors[2]) and "-3" in str(errors[3])
    if step:
        assert errors[4] is not None and errors[4].where == "program.py:5"
    if isinstance(grid.backend, LocalBackend):
        grid.backend.forget_prefixes()
        assert not grid.backend.shard._states and not grid.backend.shard.store.held_bytes


def test_cuts_of_prompts_and_prefixes_of_others_give_the_same_bits(grid: Grid) -> None:
    """Cuts of one prompt follow each other through the stages; later requests go on from what earlier ones left."""
    long, said = tuple(range(3, 52)), tuple(range(60, 90))
    requests = [
        written(program(invokes=(greedy(*prompts, logprobs=2),))) for prompts in [(long,), (said, long), (PROMPT,)]
    ]
    whole = [list(outcome.receipt.generated) for outcome in grid.run(*requests) if outcome.receipt is not None]
    before = grid.backend.scheduler
    grid.backend.forget_prefixes()
    small = PassPolicy(budget_tokens=32, least_tokens=32, tokens_beside_steps=32, least_steps=1)
    grid.backend.scheduler = Scheduler(grid.backend.description, small)
    try:
        cut, found = grid.run(*requests), grid.run(*requests)
        grid.backend.forget_prefixes()
    finally:
        grid.backend.scheduler = before
    for outcomes in (cut, found):
        assert [list(outcome.receipt.generated) for outcome in outcomes if outcome.receipt is not None] == whole
    receipts = [outcome.receipt for outcome in (cut[0], found[0])]
    assert receipts[0] is not None and len(receipts[0].passes) > STEPS, "it was cut"
    assert receipts[1] is not None and receipts[1].token_layers < receipts[0].token_layers, "it went on from a prefix"


class _Spied:
    """The loop's shards: whose steps each pass has, and whose were on their way behind it when it ended."""

    def __init__(self, shards: ProcessShards) -> None:
        self.have_room, self._shards = shards.have_room, shards
        self._flying: list[set[str]] = []
        self.ended: list[tuple[set[str], set[str]]] = []
        self.most_in_flight = 0

    def submit(self, plan: Plan) -> None:
        self._flying.append({member.program.request for member in plan.members if member.step > 0})
        self.most_in_flight = max(self.most_in_flight, len(self._flying))
        self._shards.submit(plan)

    def finished(self) -> Iterator[Any]:
        for plan, results in self._shards.finished():
            self.ended.append((self._flying.pop(0), set[str]().union(*self._flying)))
            yield plan, results


def test_while_a_group_of_steps_is_at_the_last_stage_another_one_is_behind_it(grid: Grid) -> None:
    if grid.stages == 1:
        pytest.skip("one stage has nobody to work beside")
    shards = grid.backend.shards
    spied = grid.backend.shards = _Spied(shards)
    try:
        requests = [written(program(invokes=(greedy((*PROMPT, place), steps=8),))) for place in range(1, 41)]
        outcomes = grid.run(*requests)
    finally:
        grid.backend.shards = shards
    assert all(outcome.error is None for outcome in outcomes)
    assert spied.most_in_flight == grid.stages + 1
    groups = [(own, others) for own, others in spied.ended if own]
    assert sum(len(own) for own, _ in groups) == 40 * 7
    assert max(len(own) for own, _ in groups) <= 20  # of 40, never all in one pass
    assert all(own.isdisjoint(others) for own, others in groups)
    assert sum(bool(others) for _, others in groups) >= len(groups) - grid.stages - 1  # but for the last ones
