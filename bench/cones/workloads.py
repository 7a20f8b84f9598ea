"""The cases as data: which sequences run, what is changed in each, and what each gives back.

A `Run` is one sequence with its edits; every contender is given the same runs. `parent`, `first_layer` and `position`
say where a run first differs from an earlier one: what it costs beyond that is its causal cone. Prompts are random
tokens. Imports torch and the standard library only: the peer builds the same runs in an environment of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

_FIRST_PLAIN_TOKEN = 3  # those before it are special
NUM_NOISES = 10
NUM_PREFIXES, PREFIX_TOKENS, QUESTIONS = 8, 200, 8


class Point(Enum):
    """A tensor in the model that runs change."""

    EMBEDDING = "embed_tokens.output"
    RESIDUAL = "layer.output"
    MLP = "mlp.output"
    HEADS = "o_proj.input"


class Read(Enum):
    """What a run gives back."""

    NOTHING = "nothing"
    DIFFERENCE = "difference of two logits of the last token"  # []
    LOGITS = "logits of the last token"  # [vocabulary]
    HIDDEN = "one layer's residual at the last token"  # [hidden]
    LENS = "the best logit that each layer's residual gives, at every token"  # [layers, tokens]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """One write: rows `start` to `stop` of a tensor become another run's, or have something added, or become zero."""

    point: Point
    layer: int = 0
    start: int
    stop: int
    channels: tuple[int, int] | None = None
    source: int | None = None  # the run whose rows of the same tensor are put
    added: Tensor | None = None  # [stop - start, hidden]

    @property
    def first_layer(self) -> int:
        """The first layer whose input, or whose inside, is another one because of this write."""
        return {Point.EMBEDDING: 0, Point.RESIDUAL: self.layer + 1}.get(self.point, self.layer)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One sequence."""

    ids: tuple[int, ...]
    read: Read = Read.NOTHING
    layer: int = 0  # of Read.HIDDEN
    edits: tuple[Edit, ...] = ()
    parent: int | None = None  # an earlier run, equal to this one before (first_layer, position)
    first_layer: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """One case on one model."""

    case: str
    runs: tuple[Run, ...]
    swept: tuple[int, ...]  # the runs of which slow contenders are given a few, evenly chosen
    full_size: int  # swept runs of the whole sweep
    good: int
    bad: int
    is_separate: bool = False  # each run is another user's request


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a workload needs to know of its model."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    vocabulary: int


Maker = Callable[[Shape, int, int | None], Workload]


def shape_of(folder: Path) -> Shape:
    """The shape of a Llama-shaped model's folder."""
    config = json.loads((folder / "config.json").read_text())
    return Shape(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocabulary=config["vocab_size"],
    )


def make_workload(case: str, shape: Shape, *, tokens: int, size: int | None = None) -> Workload:
    """A case with prompts of about `tokens` tokens; `size` swept runs, evenly chosen, or all."""
    return CASES[case].make(shape, tokens, size)


def evenly(items: Sequence[int], size: int | None) -> list[int]:
    """`size` of the items: one of each of as many equal stretches, chosen at random so that no period is met."""
    if size is None or size >= len(items):
        return list(items)
    rng = random.Random(0)
    bounds = [index * len(items) // size for index in range(size + 1)]
    return [items[rng.randrange(low, high)] for low, high in itertools.pairwise(bounds)]


# ----------------------------------------------------------------------------------------------------------- the cases


def _patching(shape: Shape, tokens: int, size: int | None) -> Workload:
    return _patched(shape, tokens, size, positions=range(tokens))


def _last_token(shape: Shape, tokens: int, size: int | None) -> Workload:
    return _patched(shape, tokens, size, positions=range(tokens - 1, tokens))


def _patched(shape: Shape, tokens: int, size: int | None, *, positions: range) -> Workload:
    """One clean run; the corrupt one with one of the clean run's residuals put in, layer by layer, token by token."""
    clean, corrupt, good, bad = _pair(shape, tokens)
    runs = [
        Run(ids=clean, read=Read.DIFFERENCE),
        Run(ids=corrupt, read=Read.DIFFERENCE, parent=0, position=_changed_token(tokens)),
    ]
    cells = [(layer, position) for layer in range(shape.layers) for position in positions]
    for cell in evenly(range(len(cells)), size):
        layer, position = cells[cell]
        edit = Edit(point=Point.RESIDUAL, layer=layer, start=position, stop=position + 1, source=0)
        runs.append(_fork(runs, 1, [edit]))
    return _joint("patching", runs, base=2, full_size=len(cells), good=good, bad=bad)


def _heads(shape: Shape, tokens: int, size: int | None) -> Workload:
    return _ablated(shape, tokens, size, start=0)


def _heads_last(shape: Shape, tokens: int, size: int | None) -> Workload:
    return _ablated(shape, tokens, size, start=tokens - 1)


def _ablated(shape: Shape, tokens: int, size: int | None, *, start: int) -> Workload:
    """One prompt; again with one head silent from token `start` on, head by head."""
    ids, _, good, bad = _pair(shape, tokens)
    runs = [Run(ids=ids, read=Read.DIFFERENCE)]
    full = shape.layers * shape.heads
    for cell in evenly(range(full), size):
        layer, head = divmod(cell, shape.heads)
        channels = head * shape.head_dim, (head + 1) * shape.head_dim
        edit = Edit(point=Point.HEADS, layer=layer, start=start, stop=tokens, channels=channels)
        runs.append(_fork(runs, 0, [edit]))
    return _joint("heads", runs, base=1, full_size=full, good=good, bad=bad)


def _few_shot(shape: Shape, tokens: int, size: int | None) -> Workload:
    """Users who ask different questions behind the same few-shot examples."""
    rng = random.Random(3)
    full = NUM_PREFIXES * QUESTIONS
    runs: list[Run] = []
    for number in range(max(1, min(size or full, full) // QUESTIONS)):
        prefix = _unlike(number, _ids(shape, PREFIX_TOKENS, rng))
        first = len(runs)
        for question in range(QUESTIONS):
            ids = prefix + _unlike(question, _ids(shape, rng.randint(8, 24), rng))
            is_first = question == 0
            parent, position = (None, 0) if is_first else (first, PREFIX_TOKENS)
            runs.append(Run(ids=ids, read=Read.LOGITS, parent=parent, position=position))
    return _separate("few-shot", runs, full_size=full)


def _harvest(shape: Shape, tokens: int, size: int | None) -> Workload:
    """The last token's residual after a quarter of the layers, of prompts half as long to as long as `tokens`."""
    layer = max(1, shape.layers // 4) - 1
    prompts = _ragged(shape, tokens, evenly(range(64), size), seed=4)
    runs = [Run(ids=ids, read=Read.HIDDEN, layer=layer) for ids in prompts]
    return _joint("harvest", runs, base=0, full_size=64)


def _lens(shape: Shape, tokens: int, size: int | None) -> Workload:
    """What every layer's residual says at every token of one prompt."""
    return _joint("lens", [Run(ids=_pair(shape, tokens)[0], read=Read.LENS)], base=0, full_size=1)


def _unrelated(shape: Shape, tokens: int, size: int | None) -> Workload:
    """Users with nothing in common: some read, some steer, some stop early."""
    runs: list[Run] = []
    for user, ids in enumerate(_ragged(shape, tokens, evenly(range(32), size), seed=5)):
        layer = user * 5 % shape.layers
        if user % 3 == 0:
            runs.append(Run(ids=ids, read=Read.LOGITS))
        elif user % 3 == 1:
            added = torch.randn(1, shape.hidden, generator=torch.Generator().manual_seed(user))
            last = len(ids) - 1
            edit = Edit(point=Point.RESIDUAL, layer=layer, start=last, stop=last + 1, added=added)
            runs.append(Run(ids=ids, read=Read.LOGITS, edits=(edit,)))
        else:
            runs.append(Run(ids=ids, read=Read.HIDDEN, layer=layer))
    return _separate("unrelated", runs, full_size=32)


def _tracing(shape: Shape, tokens: int, size: int | None) -> Workload:
    """Noise on the subject's embeddings; the clean run's MLP outputs put back for a few layers, at one token.

    Tokens before the subject are left out: there is no noise in them that could be taken back.
    """
    clean, _, good, bad = _pair(shape, tokens)
    start = _changed_token(tokens)
    stop = min(tokens, start + 3)
    width = max(2, shape.layers // 4)
    runs = [Run(ids=clean, read=Read.DIFFERENCE)]
    noises = torch.randn(NUM_NOISES, stop - start, shape.hidden, generator=torch.Generator().manual_seed(6))
    for noise in noises:
        runs.append(_fork(runs, 0, [Edit(point=Point.EMBEDDING, start=start, stop=stop, added=noise)]))
    cells = list(itertools.product(range(NUM_NOISES), range(shape.layers - width + 1), range(start, tokens)))
    for cell in evenly(range(len(cells)), size):
        noise_index, first, position = cells[cell]
        window = [
            Edit(point=Point.MLP, layer=layer, start=position, stop=position + 1, source=0)
            for layer in range(first, first + width)
        ]
        runs.append(_fork(runs, 1 + noise_index, window))
    return _joint("tracing", runs, base=1 + NUM_NOISES, full_size=len(cells), good=good, bad=bad)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of experiment."""

    title: str
    make: Maker


CASES: Mapping[str, Case] = {
    "a": Case(title="layer x position patching", make=_patching),
    "b": Case(title="last-token layer patching", make=_last_token),
    "c": Case(title="head ablation, all positions", make=_heads),
    "c-last": Case(title="head ablation, last position", make=_heads_last),
    "d": Case(title="requests on few-shot prefixes", make=_few_shot),
    "e": Case(title="harvest at a quarter of the depth", make=_harvest),
    "f": Case(title="logit lens, all layers", make=_lens),
    "g": Case(title="32 unrelated requests", make=_unrelated),
    "h": Case(title="causal tracing, 10 noises", make=_tracing),
}


def many_donors(shape: Shape, *, tokens: int, size: int) -> Workload:
    """A patching sweep of any size: when all layers x tokens are used up, the next clean prompt gives more."""
    rng = random.Random(7)
    _, corrupt, good, bad = _pair(shape, tokens)
    cells = shape.layers * tokens
    num_donors = -(-size // cells)
    changed = _changed_token(tokens)
    runs = [Run(ids=corrupt, read=Read.DIFFERENCE)]
    for _ in range(num_donors):
        ids = (*corrupt[:changed], *_ids(shape, 1, rng), *corrupt[changed + 1 :])
        runs.append(Run(ids=ids, parent=0, position=changed))
    for cell in evenly(range(num_donors * cells), size):
        donor, rest = divmod(cell, cells)
        layer, position = divmod(rest, tokens)
        edit = Edit(point=Point.RESIDUAL, layer=layer, start=position, stop=position + 1, source=1 + donor)
        runs.append(_fork(runs, 0, [edit]))
    return _joint("donors", runs, base=1 + num_donors, full_size=size, good=good, bad=bad)


def _fork(runs: Sequence[Run], parent: int, edits: list[Edit]) -> Run:
    """The parent's run with more edits, all of which begin at one position or token."""
    return dataclasses.replace(
        runs[parent],
        read=Read.DIFFERENCE,
        edits=(*runs[parent].edits, *edits),
        parent=parent,
        first_layer=min(edit.first_layer for edit in edits),
        position=min(edit.start for edit in edits),
    )


def _joint(case: str, runs: list[Run], *, base: int, full_size: int, good: int = 0, bad: int = 0) -> Workload:
    swept = tuple(range(base, len(runs)))
    return Workload(case=case, runs=tuple(runs), swept=swept, full_size=full_size, good=good, bad=bad)


def _separate(case: str, runs: list[Run], *, full_size: int) -> Workload:
    return dataclasses.replace(_joint(case, runs, base=0, full_size=full_size), is_separate=True)


def _pair(shape: Shape, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """A clean and a corrupt prompt that differ in one token, and the two tokens whose logits are compared."""
    rng = random.Random(1)
    clean = _ids(shape, tokens, rng)
    changed = _changed_token(tokens)
    other = clean[changed]
    while other == clean[changed]:
        (other,) = _ids(shape, 1, rng)
    good, bad = rng.sample(range(_FIRST_PLAIN_TOKEN, shape.vocabulary), 2)
    return clean, (*clean[:changed], other, *clean[changed + 1 :]), good, bad


def _changed_token(tokens: int) -> int:
    return tokens // 4


def _ids(shape: Shape, count: int, rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choices(range(_FIRST_PLAIN_TOKEN, shape.vocabulary), k=count))


def _unlike(number: int, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens with a first one that no other number has, so that nothing is shared by chance."""
    return (_FIRST_PLAIN_TOKEN + number, *ids[1:])


def _ragged(shape: Shape, tokens: int, numbers: Sequence[int], *, seed: int) -> list[tuple[int, ...]]:
    """Prompts from half of `tokens` to `tokens` long, in no order of length; the same ones for the same numbers."""
    lengths = list(range(tokens - tokens // 2, tokens + 1))
    prompts = []
    for number in numbers:
        rng = random.Random(1000 * seed + number)
        prompts.append(_unlike(number, _ids(shape, rng.choice(lengths), rng)))
    return prompts
