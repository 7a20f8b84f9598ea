"""Random programs in the whole language: what they are, how they are drawn, and how a user writes them.

A program is a list of statements for each invoke. The same functions compute on recorded values here and on plain
tensors in `language_by_hand`, which tells what a program must give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from families import FAMILIES
from hypothesis import strategies as st
from language_ops import OPERATIONS, ROW, fit
from language_sites import Spot, spans, spots
from programs import find
from torch import Tensor

Prompt = tuple[int, ...]
HIDDEN, VOCABULARY = 32, 96


@dataclass(frozen=True)
class Read:
    name: str
    spot: Spot


@dataclass(frozen=True)
class Weigh:
    """A parameter, a buffer or a weight by name, and which of its rows."""

    name: str
    owner: str
    weight: str
    row: int


@dataclass(frozen=True)
class Mask:
    """`tracer.mask`."""

    name: str


@dataclass(frozen=True)
class Apply:
    """An operation of the table, or one that takes a view apart (`TAKEN`)."""

    name: str
    op: str
    operands: tuple[str, ...]
    numbers: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A module called on a value."""

    name: str
    path: str
    operand: str
    shape: tuple[int, ...] | None  # that the value is brought into


@dataclass(frozen=True)
class Edit:
    """In-place code, or a value assigned."""

    spot: Spot
    how: str
    operand: str | None
    numbers: tuple[int, int]
    assigns: bool = False


@dataclass(frozen=True)
class Skip:
    """A module is not run; it gives its input, scaled, and a vector made of a value."""

    path: str
    operand: str | None


Statement = Read | Weigh | Mask | Apply | Call | Edit | Skip


@dataclass(frozen=True)
class Block:
    """An invoke; without prompts it means those of all before it. The last logits are saved last."""

    prompts: tuple[Prompt, ...]
    statements: tuple[Statement, ...]
    saved: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    family: str
    blocks: tuple[Block, ...]

    @property
    def edits(self) -> list[Statement]:
        return [each for block in self.blocks for each in block.statements if isinstance(each, (Edit, Skip))]

    def prompts_of(self, number: int) -> tuple[Prompt, ...]:
        own = self.blocks[number].prompts
        return own or tuple(prompt for block in self.blocks[:number] for prompt in block.prompts)


# What statements do, to recorded and to plain values alike


def compute(statement: Apply, values: Sequence[Any], lengths: Sequence[int]) -> Any:
    """The value of an operation; lengths are those of the prompts of its invoke."""
    a, b = statement.numbers
    if statement.op in TAKEN:
        return TAKEN[statement.op](*values, a, b, lengths)
    operation = OPERATIONS[statement.op]
    if operation.num_operands == 2:
        first, second = values
        second = second if tuple(second.shape) == tuple(first.shape) else fit(second, tuple(first.shape))
        found = operation.run(first, second, a, b)
    else:
        found = operation.run(values[0], a, b)
    return found * 1.0 if found is values[0] else found  # a value is saved once


def _at(view: Any, a: int, b: int, lengths: Sequence[int]) -> Any:
    position = a % min(lengths)
    if type(view) is not Tensor:
        return view.at(position)
    columns = [max(lengths) - length + position for length in lengths]
    return view[torch.arange(len(lengths)), columns]


def given_to(value: Any, shape: tuple[int, ...] | None) -> Any:
    """What a module is called on; never nearly the same everywhere, where norms would show rounding."""
    given = value if shape is None else fit(value, shape)
    return (given.tanh() + ROW[: given.shape[-1]]).contiguous()


TAKEN: dict[str, Callable[..., Any]] = {
    "column": lambda v, a, b, lengths: v[:, -1 - a % min(lengths)],
    "first columns": lambda v, a, b, lengths: v[:, 0],
    "last columns": lambda v, a, b, lengths: v[:, -min(lengths) :],
    "at": _at,
    "row of heads": lambda v, a, b, lengths: v[:, :, -1],
    "seen": lambda v, a, b, lengths: v.clamp_min(-2.0),
    "number": lambda v, a, b, lengths: v * 0.125,
    "masked sum": lambda v, mask, a, b, lengths: (v * mask[(...,) + (None,) * (v.dim() - 2)]).sum(1) / max(lengths),
}

FACTORS = (0.5, -1.0, 1.5, 0.0, -0.25)


def change(how: str, view: Any, value: Any, numbers: tuple[int, int], shortest: int) -> Any:
    """In-place code on a view `[sequences, tokens, ...]`; nothing is returned."""
    a, b = numbers
    width, factor, column = view.shape[-1], FACTORS[a % len(FACTORS)], -1 - b % shortest
    low = a % width
    part = tuple(view.shape[:1]) + tuple(view.shape[2:])
    if how == "scale":
        view.mul_(factor)
    elif how == "scale column":
        view[:, column] *= factor
    elif how == "set column":
        view[:, column] = fit(value, part)
    elif how == "add to column":
        view[:, column] += fit(value, part)
    elif how == "copy into column":
        view[:, column].copy_(fit(value, part))
    elif how == "fill column":
        view[:, column].fill_(0.25 * (a % 5))
    elif how == "features":
        view[..., low:] = 0.0
    elif how == "some features":
        view[:, column:, ..., low : low + 9] -= 0.75
    elif how == "list":
        view[:, [0, -1]] = view[:, [0, -1]] * 0.5 + fit(value, (width,))
    elif how == "add":
        view.add_(fit(value, (width,)), alpha=0.5)
    elif how == "clamp":
        view.clamp_(-0.4, 0.4)
    elif how == "whole":
        view[:] = view * 0.5 + fit(value, (width,))
    elif how == "ellipsis":
        view[...] = torch.where(view > 0.3, view * 0.1 + 0.27, view)
    elif how == "masked":
        view[view > 0.5] = 0.5
    elif how == "transposed":
        view.transpose(-1, -2)[..., low, :] *= -1.0
    elif how == "unflattened":
        view.unflatten(-1, (width // 2, 2))[..., 1] = 0.3
    elif how == "head":
        view[:, column, a % view.shape[2]] *= 0.25
    elif how == "hide":
        view[:, -1, a % view.shape[2], 1:-1] = float("-inf")
    else:
        raise AssertionError(how)


def made(how: str, view: Any, value: Any, numbers: tuple[int, int], shortest: int) -> Any:
    """What is assigned instead of a view."""
    if how == "changed":
        own = view.clone()
        change("add to column", own, value, numbers, shortest)
        return own
    if how == "blend":
        return view * 0.5 + value.tanh() * 0.5
    if how == "half":
        return view * 0.5
    return view * FACTORS[numbers[0] % len(FACTORS)] + fit(value, (view.shape[-1],))


ROWWISE = ("scale", "scale column", "fill column", "features", "some features", "clamp", "ellipsis", "masked")
IN_PLACE = (
    *ROWWISE, "set column", "add to column", "copy into column", "list", "add", "whole", "transposed", "unflattened",
)  # fmt: skip
ASSIGNED = ("changed", "blend", "tilted", "tilted")
WANTS_VALUE = {"set column", "add to column", "copy into column", "list", "add", "whole", *ASSIGNED}


def tokens_first(view: Any, spot: Spot) -> Any:
    """A view of a site's value, or of what stands for it, with its tokens in the second dimension."""
    return view if spot.token_dim == 1 else view.transpose(1, spot.token_dim)


# Drawn


@dataclass(frozen=True)
class Known:
    """A value while a program is drawn."""

    name: str
    example: Tensor
    block: int
    moment: int  # from when on it is there, in its invoke
    is_ragged: bool = False  # its rows are prompts' of different lengths
    has_features: bool = True  # its last dimension is no token's
    is_view: bool = False  # [sequences, tokens, ...] of its invoke
    hangs_on: frozenset[int] = frozenset()  # invokes


@dataclass
class Used:
    """What statements so far have named, of some prompts."""

    moments: dict[int, Spot] = field(default_factory=dict)
    skipped: list[tuple[int, int]] = field(default_factory=list)

    def allows(self, spot: Spot) -> bool:
        if any(first < spot.moment <= last for first, last in self.skipped):
            return False
        return self.moments.get(spot.moment, spot) == spot


@cache
def all_spots(family: str) -> tuple[Spot, ...]:
    return tuple(spots(family))


@cache
def shapes(family: str) -> dict[Spot, tuple[tuple[int, ...], torch.dtype]]:
    """The shapes of all sites of one prompt of five tokens."""
    from language_by_hand import look_around

    return look_around(family, all_spots(family))


@st.composite
def crowds(draw: st.DrawFn, family: str, size: int, *, on_ranks: bool = False) -> list[Program]:
    """Programs over prompts that have much in common."""
    token = st.integers(1, VOCABULARY - 1)
    base = tuple(draw(st.lists(token, min_size=8, max_size=8)))
    cut = draw(st.integers(3, 7))
    pool = (base, base, base[:cut], (*base[:cut], 5, 9, 17), (*base[:-1], 11), base[:3])
    return [_Author(draw, family, pool, on_ranks).program() for _ in range(size)]


class _Author:
    """Writes one program."""

    def __init__(self, draw: st.DrawFn, family: str, pool: tuple[Prompt, ...], on_ranks: bool) -> None:
        self.draw, self.family, self.pool = draw, family, pool
        self.names = FAMILIES[family]
        self.spots = [spot for spot in all_spots(family) if spot.on_ranks or not on_ranks]
        self.known: list[Known] = []
        self.counted = 0
        self.used: list[Used] = []
        self.has_flow = False  # an edit of one invoke hangs on another

    def one(self, choices: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(choices))

    def numbers(self) -> tuple[int, int]:
        return self.draw(st.tuples(st.integers(0, 63), st.integers(0, 63)))

    def program(self) -> Program:
        blocks: list[Block] = []
        for number in range(self.one([1, 2, 2, 3])):
            blocks.append(self.block(len(blocks), self.prompts(), blocks))
            if number and self.one([False, False, True]):
                blocks.append(self.block(len(blocks), (), blocks))
        return Program(self.family, tuple(blocks))

    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(self.one(self.pool) for _ in range(self.one([1, 1, 2, 3])))

    def block(self, number: int, prompts: tuple[Prompt, ...], before: list[Block]) -> Block:
        self.number, self.is_empty = number, not prompts
        everyone = prompts or tuple(prompt for block in before for prompt in block.prompts)
        self.lengths = tuple(map(len, everyone))
        self.own = Used()
        self.used.append(self.own)
        statements: list[Statement] = []
        for _ in range(self.draw(st.integers(3, 10))):
            kind = self.one(_KINDS[self.is_empty])
            statements.extend(getattr(self, kind)())
        logits = next(spot for spot in self.spots if spot.name == "lm_head.output")
        name = self.keep(self.example(logits), logits.moment, len(set(self.lengths)) > 1, is_view=True)
        last = self.apply_to(self.known[-1], "column", numbers=(0, 0))
        statements.extend([Read(name, logits), *last])
        mine = [known for known in self.known[:-2] if known.block == number]
        taken = [each.name for each in mine if each.example.dtype.is_floating_point]
        saved = self.draw(st.lists(st.sampled_from(taken), max_size=4, unique=True)) if taken else []
        written = [each.name for each in statements if isinstance(each, Apply) and each.op in ("written", "viewed")]
        saved = [*saved, *taken[-2:], *written, self.known[-1].name]
        return Block(prompts, tuple(statements), tuple(dict.fromkeys(saved)))

    # statements

    def read(self) -> Iterator[Statement]:
        spot = self.spot([spot for spot in self.spots if spot.is_float])
        if spot is not None:
            yield from self.read_at(spot)

    def read_at(self, spot: Spot) -> Iterator[Statement]:
        is_ragged = len(set(self.lengths)) > 1
        example = self.example(spot)
        has_keys = spot.writes == "scale"
        name = self.keep(example, spot.moment, is_ragged, has_features=not has_keys, is_view=spot.token_dim == 1)
        yield Read(name, spot)
        if spot.name == "scores":
            raw = self.known[-1]
            yield from self.apply_to(raw, "seen")
            self.known.remove(raw)  # it is -inf in places
        if self.one([True, False]) and spot.token_dim == 1:
            yield from self.take()

    def take(self) -> Iterator[Statement]:
        views = [known for known in self.known if known.is_view and known.block == self.number]
        if not views:
            return
        view = self.one(views[-3:])
        how = self.one(["column", "column", "first columns", "last columns", "at", "number", "masked sum"])
        if how == "masked sum":
            mask = self.keep(torch.ones(view.example.shape[:2], dtype=torch.bool), 0, is_ragged=True)
            yield Mask(mask)
            yield from self.apply_to(view, how, self.known[-1])
        else:
            yield from self.apply_to(view, how)

    def weigh(self) -> Iterator[Statement]:
        from language_by_hand import plain_weight

        layer = f"{self.names.layers}.{self.draw(st.integers(0, self.names.num_layers - 1))}"
        choices = [(layer, name) for name in ("W_Q", "W_K", "W_O", *(["W_out"] if self.family != "mixtral" else []))]
        choices += [("", "W_E"), ("", "W_U"), (self.names.norm, "weight"), ("lm_head", "weight")]
        if self.family != "gpt2":
            choices.append(("model.rotary_emb", "inv_freq"))
        owner, weight = self.one(choices)
        example = plain_weight(self.family, owner, weight)
        row = self.draw(st.integers(0, example.shape[0] - 1))
        yield Weigh(self.keep(example[row : row + 1], 0), owner, weight, row)

    def apply(self) -> Iterator[Statement]:
        values = [known for known in self.known if known.example.dtype.is_floating_point and self.can_use(known)]
        if not values:
            return
        value = self.one(values[-5:])
        for _ in range(self.draw(st.integers(1, 3))):
            kinds = ["any"]
            if value.has_features and value.example.dim() >= (3 if value.is_ragged else 1):
                kinds += ["features"] * 2
            if not value.is_ragged and value.example.dim() >= 2:
                kinds += ["whole"]
            kind = self.one(kinds)
            op = self.one([name for name, operation in OPERATIONS.items() if operation.on == kind])
            others: list[Known] = []
            if OPERATIONS[op].num_operands == 2:
                rest = [
                    known
                    for known in values
                    if not known.is_ragged
                    or (value.is_ragged and known.block == value.block and known.example.shape == value.example.shape)
                ]
                if not rest:
                    continue
                others = [self.one(rest[-5:])]
            made = [*self.apply_to(value, op, *others)]
            yield from made
            if made:
                value = self.known[-1]

    def apply_to(
        self, value: Known, op: str, *others: Known, numbers: tuple[int, int] | None = None
    ) -> Iterator[Statement]:
        operands = (value, *others)
        statement = Apply("", op, tuple(each.name for each in operands), numbers or self.numbers())
        try:
            example = compute(statement, [each.example for each in operands], self.lengths)
        except (RuntimeError, IndexError, ValueError):  # not of this shape
            return
        is_small = 0 < example.numel() <= 4096 and example.dim() <= 5 and example.isfinite().all()
        if not is_small:
            return
        is_taken = op in ("column", "last columns", "at", "row of heads", "masked sum")
        is_ragged = any(each.is_ragged for each in operands) and not is_taken and op != "first columns"
        is_view = value.is_view and example.shape[:2] == value.example.shape[:2] and example.dim() > 2
        is_view = is_view and all(each.block == self.number for each in operands)
        is_view = is_view and (op not in TAKEN or op == "number") and OPERATIONS.get(op, _ANY).on != "whole"
        moment = max(each.moment for each in operands if each.block == self.number) if any(
            each.block == self.number for each in operands
        ) else 0  # fmt: skip
        name = self.keep(example, moment, is_ragged, has_features=value.has_features, is_view=is_view,
                         operands=operands)  # fmt: skip
        yield replace(statement, name=name)

    def call(self) -> Iterator[Statement]:
        layer = f"{self.names.layers}.{self.draw(st.integers(0, self.names.num_layers - 1))}"
        paths = [(self.names.norm, HIDDEN), ("lm_head", HIDDEN)]
        if self.family == "gpt2":
            paths += [(f"{layer}.ln_2", HIDDEN), (f"{layer}.mlp", HIDDEN), (f"{layer}.mlp.act", 20)]
            paths += [(f"{layer}.attn.c_attn", HIDDEN), (f"{layer}.mlp.c_proj", 128)]
        else:
            paths += [(f"{layer}.input_layernorm", HIDDEN), (f"{layer}.self_attn.q_proj", HIDDEN)]
        if self.family in ("llama", "gemma2"):
            paths += [(f"{layer}.mlp", HIDDEN), (f"{layer}.mlp.act_fn", 20), (f"{layer}.mlp.down_proj", 64)]
        path, width = self.one(paths)
        values = [known for known in self.known if known.example.dtype.is_floating_point and self.can_use(known)]
        fitting = [each for each in values if each.example.shape[-1:] == (width,) and each.example.dim() > 1]
        fitting = [each for each in fitting if each.has_features and (each.is_view or not each.is_ragged)]
        whole = [each for each in values if not each.is_ragged]
        if not (fitting or whole):
            return
        value = self.one(fitting or whole)
        shape = None if fitting else (1, 2, width)
        given = given_to(value.example, shape)
        from language_by_hand import plain_model

        with torch.no_grad():
            example = plain_model(self.family).get_submodule(path)(given)
        moment = value.moment if value.block == self.number else 0
        name = self.keep(
            example,
            moment,
            value.is_ragged,
            is_view=value.is_view and value.block == self.number and shape is None,
            operands=[value],
        )
        yield Call(name, path, value.name, shape)

    def edit(self) -> Iterator[Statement]:
        if self.is_empty and self.has_flow:  # it is one write of all prompts: what they are given would hang on itself
            return
        spot = self.spot([spot for spot in self.spots if spot.writes in ("all", "in place", "scale")])
        if spot is None:
            return
        width, shape = self.example(spot).shape[-1], tokens_first(self.example(spot), spot).shape
        if spot.writes == "scale":
            can_hide = spot.name == "scores" and min(self.lengths) > 2 and not self.is_empty
            how = self.one(["head", "head", *["hide"] * can_hide])
        elif self.is_empty:
            how = self.one(ROWWISE)
        else:
            ways = [how for how in IN_PLACE if how != "unflattened" or width % 2 == 0]
            how = self.one([how for how in ways if how != "list" or len(set(self.lengths)) == 1])
        if len(shape) < 3:
            return
        yield from self.with_value(spot, how, assigns=False)

    def assign(self) -> Iterator[Statement]:
        if self.is_empty and self.has_flow:
            return
        allowed = [spot for spot in self.spots if spot.writes in ("all", "assign", "scale")]
        spot = self.spot(allowed)
        if spot is not None:
            how = "half" if spot.writes == "scale" or self.is_empty else self.one(ASSIGNED)
            yield from self.with_value(spot, how, assigns=True)

    def with_value(self, spot: Spot, how: str, *, assigns: bool) -> Iterator[Statement]:
        operand = None
        if how in WANTS_VALUE:
            values = [known for known in self.known if self.can_use(known, spot.moment)]
            values = [known for known in values if known.example.dtype.is_floating_point]
            if how == "blend":
                shape = self.example(spot).shape
                values = [
                    each
                    for each in values
                    if each.example.shape == shape
                    and (not each.is_ragged or (each.block == self.number and each.is_view))
                    and spot.token_dim == 1
                ]
            else:
                values = [each for each in values if not each.is_ragged]
            if not values:
                return
            operand = self.given(values[-6:])
        self.use(spot)
        yield Edit(spot, how, operand, self.numbers(), assigns)

    def skip(self) -> Iterator[Statement]:
        path, (first, last) = self.one(sorted(spans(self.family).items()))
        inside = [spot for spot in all_spots(self.family) if first < spot.moment <= last]
        others = self.used if self.is_empty else [self.own]
        if any(spot.moment in used.moments for spot in inside for used in others) or self.is_empty:
            return
        if any(low <= last and first <= high for low, high in self.own.skipped):
            return
        entry = next(spot for spot in all_spots(self.family) if spot.path == path and spot.keys == ("input",))
        if not self.own.allows(entry):
            return
        self.use(entry)
        self.own.skipped.append((first, last))
        values = [known for known in self.known if self.can_use(known, first) and not known.is_ragged]
        values = [known for known in values if known.example.dtype.is_floating_point]
        yield Skip(path, self.given(values[-4:]) if values else None)

    # what there is

    def given(self, values: list[Known]) -> str:
        """One of them, for an edit."""
        value: Known = self.one(values)
        self.has_flow |= value.hangs_on != {self.number}
        return value.name

    def spot(self, choices: list[Spot]) -> Spot | None:
        others = self.used if self.is_empty else [self.own]
        allowed = [spot for spot in choices if all(used.allows(spot) for used in others)]
        if not allowed:
            return None
        special = [spot for spot in allowed if len(spot.keys) > 1 or "." not in spot.name or spot.token_dim == 2]
        spot: Spot = self.one(self.one([allowed, special or allowed]))
        self.use(spot)
        return spot

    def use(self, spot: Spot) -> None:
        self.own.moments[spot.moment] = spot

    def can_use(self, known: Known, moment: int | None = None) -> bool:
        """Here, or for an edit at a moment."""
        if known.block != self.number:
            return not known.is_ragged
        return moment is None or known.moment <= moment

    def example(self, spot: Spot) -> Tensor:
        shape, dtype = shapes(self.family)[spot]
        size = [*shape]
        size[0], size[spot.token_dim] = len(self.lengths), max(self.lengths)
        if spot.writes == "scale":
            size[3] = max(self.lengths)
        return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)

    def keep(
        self,
        example: Tensor,
        moment: int,
        is_ragged: bool = False,
        *,
        has_features: bool = True,
        is_view: bool = False,
        operands: Sequence[Known] = (),
    ) -> str:
        name = f"v{self.counted}"
        self.counted += 1
        hangs_on = frozenset({self.number}).union(*(each.hangs_on for each in operands))
        self.known.append(Known(name, example, self.number, moment, is_ragged, has_features, is_view, hangs_on))
        return name


_ANY = OPERATIONS["neg"]
_KINDS = {
    False: [
        "read",
        "read",
        "take",
        "apply",
        "apply",
        "apply",
        "edit",
        "edit",
        "edit",
        "assign",
        "call",
        "weigh",
        "skip",
    ],
    True: ["read", "read", "read", "take", "apply", "edit", "assign"],
}


# As a user writes it


def record(model: Any, program: Program, **options: Any) -> Any:
    """The trace; its saves in the order of `language_by_hand`."""
    with model.trace(**options) as tracer:
        values: dict[str, Any] = {}
        for number, block in enumerate(program.blocks):
            with tracer.invoke([list(prompt) for prompt in block.prompts]) if block.prompts else tracer.invoke():
                lengths = [len(prompt) for prompt in program.prompts_of(number)]
                for statement in block.statements:
                    _write(model, tracer, statement, values, lengths)
                for name in block.saved:
                    values[name].save()
    return tracer


def _write(model: Any, tracer: Any, statement: Statement, values: dict[str, Any], lengths: list[int]) -> None:
    match statement:
        case Read(name, spot):
            values[name] = spot.get(model)
        case Weigh(name, owner, weight, row):
            values[name] = getattr(find(model, owner) if owner else model, weight)[row : row + 1]
        case Mask(name):
            values[name] = tracer.mask
        case Apply(name, _, operands, _):
            values[name] = compute(statement, [values[each] for each in operands], lengths)
        case Call(name, path, operand, shape):
            given = values[operand]
            values[name] = find(model, path)(given_to(given, shape))
        case Edit(spot, how, operand, numbers, assigns):
            value, view = values[operand] if operand else None, spot.get(model)
            if assigns:
                new = made(how, tokens_first(view, spot), value, numbers, min(lengths))
                spot.put(model, tokens_first(new, spot))
            else:
                change(how, tokens_first(view, spot), value, numbers, min(lengths))
        case Skip(path, operand):
            module = find(model, path)
            module.skip(instead(module.input, values[operand] if operand else None))


def instead(given: Any, value: Any) -> Any:
    """What a skipped module gives."""
    return given * 0.75 if value is None else given * 0.75 + fit(value, (given.shape[-1],))
