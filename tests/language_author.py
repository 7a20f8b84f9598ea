"""How random programs are drawn: statement by statement, each on values and sites that are there.

Every statement is computed on examples as it is drawn, so that programs have right shapes and are worth comparing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st
from language_by_hand import plain_model, plain_weight
from language_desk import Desk, Known, Used, all_spots
from language_meanings import ASSIGNED, IN_PLACE, ROWWISE, TAKEN, WANTS_VALUE, compute, given_to, tokens_first
from language_ops import OPERATIONS
from language_programs import Apply, Block, Call, Edit, Mask, Program, Prompt, Read, Skip, Statement, Weigh
from language_sites import Spot, spans

HIDDEN, VOCABULARY = 32, 96


@st.composite
def crowds(draw: st.DrawFn, family: str, size: int, *, on_ranks: bool = False) -> list[Program]:
    """Programs over prompts that have much in common."""
    token = st.integers(1, VOCABULARY - 1)
    base = tuple(draw(st.lists(token, min_size=8, max_size=8)))
    cut = draw(st.integers(3, 7))
    pool = (base, base, base[:cut], (*base[:cut], 5, 9, 17), (*base[:-1], 11), base[:3])
    return [_Author(draw, family, pool, on_ranks).program() for _ in range(size)]


class _Author(Desk):
    """Writes one program."""

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
