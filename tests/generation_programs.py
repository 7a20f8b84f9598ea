"""Random generation requests: what each step reads, changes, hands to other steps and invokes, and saves.

A program is drawn from a seed (`crowd`) and written as a request's graph (`written`), step by step as a loop records
it. What it must give is told by `generation_by_hand`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from families import FAMILIES, Family, Place
from programs import vector
from torch import Tensor

from polytrace.graph import (
    Call,
    Constant,
    Generation,
    Graph,
    Invoke,
    Last,
    Node,
    NodeId,
    Op,
    Options,
    Port,
    Read,
    Ref,
    Request,
    Sampling,
    Save,
    Sharing,
    Site,
    Stop,
    Write,
)
from polytrace.tensors import RawTensor

Slot = int  # a value `[width]` that statements name
LAST = (slice(None), -1)  # the last column of every sequence


@dataclass(frozen=True)
class Take:
    """The mean over an invoke's sequences of a place's last column; of one that has ended it is 0."""

    slot: Slot
    place: Place


@dataclass(frozen=True)
class Mix:
    """Half of the sum of some values."""

    slot: Slot
    parts: tuple[Slot, ...]


@dataclass(frozen=True)
class Add:
    """To the last column: a value, or a vector from a seed."""

    place: Place
    source: Slot | None = None
    seed: int = 0


@dataclass(frozen=True)
class Fill:
    """Some features of the last column become 0."""

    place: Place
    features: tuple[int, int]


@dataclass(frozen=True)
class Scale:
    """What a place hands on is another tensor: 1.25 times what it was."""

    place: Place


@dataclass(frozen=True)
class Look:
    """Saves the last column."""

    place: Place
    name: str


@dataclass(frozen=True)
class Flood:
    """Adds a vector to all columns."""

    place: Place
    seed: int


@dataclass(frozen=True)
class See:
    """Saves all columns, left-padded."""

    place: Place
    name: str


@dataclass(frozen=True)
class Lens:
    """Saves the logits of a value."""

    slot: Slot
    name: str


@dataclass(frozen=True)
class Keep:
    """Saves a value."""

    slot: Slot
    name: str


@dataclass(frozen=True)
class Favour:
    """Makes a token likelier."""

    token: int


@dataclass(frozen=True)
class SeeToken:
    """Saves what sequences go on with."""

    name: str


@dataclass(frozen=True)
class Shift:
    """Sequences go on with another token than the one that was drawn."""

    by: int


@dataclass(frozen=True)
class StopAt:
    """Ends the sequences whose token has a remainder of 7."""

    remainder: int


Statement = Take | Mix | Add | Fill | Flood | Scale | Look | See | Lens | Keep | Favour | SeeToken | Shift | StopAt


@dataclass(frozen=True)
class Block:
    """What one invoke does at a step; `num_steps` times the same."""

    step: int
    invoke: int
    statements: tuple[Statement, ...]
    num_steps: int = 1


@dataclass(frozen=True)
class Ending:
    """Behind the loop: the values that came as one, or the first of them that came."""

    name: str
    slots: tuple[Slot, ...]  # the latest step's last
    is_stack: bool


@dataclass(frozen=True)
class Program:
    """One user's generation."""

    family: Family
    invokes: tuple[Invoke, ...]
    blocks: tuple[Block, ...]  # by step
    endings: tuple[Ending, ...] = ()

    @property
    def num_steps(self) -> int:
        return max(one.generation.max_new_tokens for one in self.invokes if one.generation is not None)


def places(family: Family) -> list[Place]:
    """Those of the model's width, in the order in which a forward comes by."""
    is_gpt2 = family.layers.startswith("transformer")
    inside = ("ln_2",) if is_gpt2 else ("post_attention_layernorm",)
    found = []
    for layer in range(family.num_layers):
        found += [
            family.place(layer, ("", "input", (), family.width)),
            family.place(layer, (family.attention, "output", (0,), family.width)),
            *(family.place(layer, (path, "output", (), family.width)) for path in inside),
            family.place(layer, ("mlp", "output", (), family.width)),
            family.residual(layer),
        ]
    return [*found, Place(family.norm, "input", (), family.width)]


def inner_places(family: Family) -> list[Place]:
    """Of other widths: queries, keys and values before anything is done to them, neurons."""
    if family.layers.startswith("transformer"):
        paths = (("attn.c_attn", "output", 96), ("mlp.c_proj", "input", 128))
    else:
        heads = (("self_attn.q_proj", "output", 32), ("self_attn.k_proj", "output", 16))
        paths = (*heads, ("self_attn.v_proj", "output", 16), ("mlp.down_proj", "input", 64))
    return [
        family.place(layer, (path, port, (), width))
        for layer in range(family.num_layers)
        for path, port, width in paths
    ]


# Drawn


def crowd(family: str, size: int, seed: int, *, longest: int = 36, steps: int = 6) -> list[Program]:
    """Programs of users whose prompts begin alike, some of them with the same edits."""
    random = Random(f"{family} {seed}")
    base = tuple(random.randrange(1, 96) for _ in range(longest))
    pool = [base, base[:-1], base[: longest // 2], (*base[: longest // 3], 5, 6), base[:3], base[-2:]]
    return [_Author(FAMILIES[family], Random(random.random()), pool, steps).program() for _ in range(size)]


class _Author:
    """Draws one program."""

    def __init__(self, family: Family, random: Random, pool: Sequence[tuple[int, ...]], steps: int) -> None:
        self.family, self.random, self.pool, self.steps = family, random, pool, steps
        self.places, self.inner_places = places(family), inner_places(family)
        self.slots: list[tuple[Slot, int, int]] = []  # with the step and the invoke that took them
        self.num_names = 0

    def program(self) -> Program:
        random = self.random
        count = random.choice([1, 1, 2, 3])
        invokes = [Invoke(sequences=self._prompts(), generation=self._generation()) for _ in range(count)]
        if count > 1 and random.random() < 0.3:
            invokes[0] = replace(invokes[0], generation=None)  # a source
        blocks = []
        for step in range(max(one.generation.max_new_tokens for one in invokes if one.generation is not None)):
            for place, invoke in enumerate(invokes):
                has_step = step == 0 or (invoke.generation is not None and step < invoke.generation.max_new_tokens)
                if has_step and random.random() < 0.75:
                    blocks.append(self._block(step, place, invoke))
        for place, invoke in enumerate(invokes):
            more = 0 if invoke.generation is None else invoke.generation.max_new_tokens - 1
            if more > 1 and random.random() < 0.4:
                own = [self._constant_edit(), Look(random.choice(self.places), self._name())]
                blocks.append(Block(1, place, tuple(own), more))
        return Program(self.family, tuple(invokes), tuple(blocks), tuple(self._endings()))

    def _prompts(self) -> tuple[tuple[int, ...], ...]:
        own = [self.random.choice(self.pool) for _ in range(self.random.choice([1, 1, 2, 3]))]
        return tuple(own[:1] * 3 if len(own) == 3 and self.random.random() < 0.5 else own)

    def _generation(self) -> Generation:
        random = self.random
        sampling = Sampling()
        if random.random() < 0.4:
            sampling = Sampling(
                do_sample=True,
                temperature=random.choice([0.7, 1.0, 1.5]),
                top_k=random.choice([0, 20]),
                top_p=random.choice([1.0, 0.9]),
                repetition_penalty=random.choice([1.0, 1.2]),
                seed=random.randrange(1000),
            )
        ends = random.choice([0, 0, 12])
        return Generation(
            max_new_tokens=random.randint(1, self.steps),
            sampling=sampling,
            eos=tuple(random.sample(range(96), ends)),
        )

    def _name(self) -> str:
        self.num_names += 1
        return f"s{self.num_names}"

    def _constant_edit(self) -> Statement:
        place, seed = self.random.choice(self.places), self.random.randrange(3)
        inner = Fill(self.random.choice(self.inner_places), (2, 12))
        return self.random.choice([Add(place, seed=seed), Fill(place, (4, 20)), inner, inner, Flood(place, seed)])

    def _block(self, step: int, invoke: int, where: Invoke) -> Block:
        random = self.random
        found: list[Statement] = []
        for _ in range(random.randint(1, 4)):
            kind = random.choice(["take", "take", "mix", "add", "add", "edit", "scale", "look", "save", "end"])
            place = random.choice(self.places)
            if kind == "take":
                self.slots.append((len(self.slots), step, invoke))
                found.append(Take(self.slots[-1][0], place))
            elif kind == "mix" and len(self.slots) > 1:
                parts = random.sample(self.slots[-6:], 2)
                # A value of this block counts as one of it: what is made of it is known no earlier.
                self.slots.append(
                    (len(self.slots), step, invoke if any(p[1:] == (step, invoke) for p in parts) else -1)
                )
                found.append(Mix(self.slots[-1][0], tuple(part[0] for part in parts)))
            elif kind == "add" and (sources := self._sources(step, invoke)):
                found.append(Add(place, random.choice(sources[-4:])))
            elif kind == "edit":
                found.append(self._constant_edit())
            elif kind == "scale" and not place.selector:
                found.append(Scale(place))
            elif kind == "look":
                seen = random.choice([place, random.choice(self.inner_places)])
                found.append(random.choice([Look, See])(seen, self._name()))
            elif kind == "save" and self.slots:
                found.append(random.choice([Keep, Lens])(random.choice(self.slots)[0], self._name()))
            elif kind == "end" and where.generation is not None:
                found.append(self._end())
        if len(where.sequences) == 1 and random.random() < 0.5:
            found += self._within(step, invoke)
        return Block(step, invoke, tuple(found))

    def _sources(self, step: int, invoke: int) -> list[Slot]:
        """Values that are there before the block's own forward."""
        return [slot for slot, at, of in self.slots if (at, of) != (step, invoke)]

    def _within(self, step: int, invoke: int) -> Iterator[Statement]:
        """A value that goes forward within one forward."""
        first, then = sorted(self.random.sample(range(len(self.places)), 2))
        self.slots.append((len(self.slots), step, invoke))
        yield Take(self.slots[-1][0], self.places[first])
        yield Add(self.places[then], self.slots[-1][0])

    def _end(self) -> Statement:
        random = self.random
        return random.choice(
            [
                Favour(random.randrange(96)),
                SeeToken(self._name()),
                Shift(random.randrange(1, 96)),
                StopAt(random.randrange(7)),
            ]
        )

    def _endings(self) -> Iterator[Ending]:
        for is_stack in (True, False):
            if self.slots and self.random.random() < 0.5:
                some = sorted(self.random.sample([slot for slot, _, _ in self.slots], min(4, len(self.slots))))
                yield Ending(self._name(), tuple(some), is_stack)


# As requests


TOKEN = Site(module="", port=Port.TOKEN)
LOGITS = Site(module="lm_head", port=Port.OUTPUT)


def site(place: Place) -> Site:
    return Site(module=place.module, port=Port(place.port), selector=place.selector)


class Writer:
    """Nodes, one after another, as a loop records them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, RawTensor] = {}
        self.step, self.num_steps, self.invoke = 0, 1, 0

    def _put(self, node: Node) -> Ref:
        self.nodes.append(node)
        return Ref(NodeId(len(self.nodes) - 1))

    @property
    def where(self) -> str:
        """Of the next node."""
        return f"program.py:{len(self.nodes) + 1}"

    def read(self, where: Site) -> Ref:
        return self._put(
            Read(site=where, invoke=self.invoke, where=self.where, step=self.step, num_steps=self.num_steps)
        )

    def op(self, name: str, *args: Any, **kwargs: Any) -> Ref:
        return self._put(Op(name=name, args=args, kwargs=kwargs, where=self.where))

    def call(self, module: str, value: Ref) -> Ref:
        return self._put(Call(module=module, args=(value,), where=self.where))

    def constant(self, value: Tensor) -> Ref:
        name = f"c{len(self.constants)}"
        data = memoryview(value.numpy().tobytes())
        dtype = str(value.dtype).removeprefix("torch.")
        self.constants[name] = RawTensor(dtype=dtype, shape=tuple(value.shape), data=data)
        return self._put(Constant(name=name, where=self.where))

    def write(self, where: Site, value: Ref, *, in_place: bool = True) -> None:
        self._put(
            Write(
                site=where,
                invoke=self.invoke,
                value=value,
                in_place=in_place,
                where=self.where,
                step=self.step,
                num_steps=self.num_steps,
            )
        )

    def save(self, value: Ref, name: str, *, is_of_step: bool = True) -> None:
        step = self.step if is_of_step else None
        self._put(Save(name=name, value=value, where=self.where, step=step, num_steps=self.num_steps))

    def stop(self, value: Ref) -> None:
        self._put(Stop(value=value, invoke=self.invoke, where=self.where, step=self.step))

    def last(self, values: Sequence[Ref]) -> Ref:
        return self._put(Last(values=tuple(values), where=self.where))

    def request(self, invokes: Sequence[Invoke], sharing: Sharing = Sharing.TENANT) -> Request:
        return Request(
            graph=Graph(nodes=tuple(self.nodes)),
            invokes=tuple(invokes),
            constants=self.constants,
            options=Options(sharing=sharing),
        )


def written(program: Program, sharing: Sharing = Sharing.TENANT) -> Request:
    """The program as a request."""
    writer, slots = Writer(), {}
    for block in program.blocks:
        writer.step, writer.invoke, writer.num_steps = block.step, block.invoke, block.num_steps
        for statement in block.statements:
            _write(writer, program.family, statement, slots)
    for ending in program.endings:
        values = [slots[slot] for slot in ending.slots]
        if ending.is_stack:
            found = writer.op("stack", [writer.last([value]) for value in values])
        else:
            found = writer.last(values[::-1])
        writer.save(found, ending.name, is_of_step=False)
    return writer.request(program.invokes, sharing)


def _write(writer: Writer, family: Family, statement: Statement, slots: dict[Slot, Ref]) -> None:
    if isinstance(statement, Take):
        slots[statement.slot] = writer.op("mean", writer.op("getitem", writer.read(site(statement.place)), LAST), 0)
    elif isinstance(statement, Mix):
        first, second = (slots[part] for part in statement.parts)
        slots[statement.slot] = writer.op("mul", writer.op("add", first, second), 0.5)
    elif isinstance(statement, Keep):
        writer.save(slots[statement.slot], statement.name)
    elif isinstance(statement, Lens):
        norm = writer.call(family.norm, writer.op("getitem", slots[statement.slot], (None,)))
        writer.save(writer.call("lm_head", norm), statement.name)
    elif isinstance(statement, See):
        writer.save(writer.read(site(statement.place)), statement.name)
    elif isinstance(statement, Flood):
        where = site(statement.place)
        more = writer.constant(vector(statement.seed, statement.place.width, torch.float32))
        writer.write(where, writer.op("add", writer.read(where), more))
    elif isinstance(statement, Look):
        writer.save(writer.op("getitem", writer.read(site(statement.place)), LAST), statement.name)
    elif isinstance(statement, Scale):
        where = site(statement.place)
        writer.write(where, writer.op("mul", writer.read(where), 1.25), in_place=False)
    elif isinstance(statement, Add):
        where, width = site(statement.place), statement.place.width
        seen = writer.read(where)
        is_vector = statement.source is None
        more = writer.constant(vector(statement.seed, width, torch.float32)) if is_vector else slots[statement.source]
        changed = writer.op("add", writer.op("getitem", seen, LAST), more)
        writer.write(where, writer.op("setitem", seen, LAST, changed))
    elif isinstance(statement, Fill):
        where = site(statement.place)
        index = (*LAST, slice(*statement.features))
        writer.write(where, writer.op("setitem", writer.read(where), index, 0.0))
    elif isinstance(statement, Favour):
        seen, index = writer.read(LOGITS), (*LAST, statement.token)
        writer.write(
            LOGITS, writer.op("setitem", seen, index, writer.op("add", writer.op("getitem", seen, index), 9.0))
        )
    else:
        seen = writer.read(TOKEN)
        token = writer.op("getitem", seen, LAST)
        if isinstance(statement, SeeToken):
            writer.save(token, statement.name)
        elif isinstance(statement, Shift):
            other = writer.op("remainder", writer.op("add", token, statement.by), 96)
            writer.write(TOKEN, writer.op("setitem", seen, LAST, other))
        else:
            writer.stop(writer.op("eq", writer.op("remainder", token, 7), statement.remainder))
