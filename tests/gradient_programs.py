"""Random programs with gradients: as polytrace traces, and as plain autograd over hooks.

A program has invokes with edits, values that go from one to another, targets at sites of any of them, the vectors that
its edits add, and losses. Every target's and every vector's gradient of every loss is saved, and one may be halved on
its way. A target is what its site has before the edit there; any other value is what it has behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from families import Family, Place
from hypothesis import strategies as st
from programs import get
from torch import Tensor

Prompts = tuple[tuple[int, ...], ...]
Spot = tuple[int, Place]  # of an invoke


@dataclass(frozen=True)
class Edit:
    """One change at a place. `kind`: add (a vector), scale, freeze (gradients stop there), patch (a source's mean)."""

    kind: str
    place: Place
    seed: int = 0
    source: Spot | None = None  # of a patch: its last tokens, averaged over prompts

    @property
    def in_place(self) -> bool:
        return self.place.port == "output" and self.kind in ("add", "patch")

    def vector(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.place.width, generator=draw) * 0.3

    def apply(self, value: Any, added: Any) -> Any:
        if self.kind == "scale":
            return value * 0.7
        return value.detach() if self.kind == "freeze" else value + added


@dataclass(frozen=True)
class Invoke:
    prompts: Prompts
    edits: tuple[Edit, ...] = ()  # at most one at a place


@dataclass(frozen=True)
class GradientProgram:
    invokes: tuple[Invoke, ...]
    targets: tuple[Spot, ...]
    losses: tuple[tuple[tuple[Spot, int], ...], ...]  # each a sum of what weightings (a seed each) give of last tokens
    halved: int | None = None  # the target whose gradient is halved on its way

    def is_read(self, spot: Spot) -> bool:
        """Whether anybody wants the value of a spot."""
        lost = {one for loss in self.losses for one, _ in loss}
        sources = {edit.source for invoke in self.invokes for edit in invoke.edits}
        return spot in self.targets or spot in lost or spot in sources

    def places(self, number: int) -> list[Place]:
        """Those of an invoke that anything happens at."""
        spots = {*self.targets, *(one for loss in self.losses for one, _ in loss)}
        edits = [edit for invoke in self.invokes for edit in invoke.edits]
        spots |= {edit.source for edit in edits if edit.source is not None}
        spots |= {(number, edit.place) for edit in self.invokes[number].edits}
        return sorted({place for one, place in spots if one == number}, key=str)


def weighting(place: Place, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(place.width, generator=draw) / place.width**0.5


# --- as a trace


def record(model: Any, program: GradientProgram, **options: Any) -> Any:
    """Writes the program as a user would; returns the tracer. Saves are in the order of `run_by_hand`."""
    reads: dict[Spot, Any] = {}
    vectors: list[Any] = []
    with model.trace(**options) as tracer:
        for number, invoke in enumerate(program.invokes):
            with tracer.invoke([list(prompt) for prompt in invoke.prompts]):
                for place in program.places(number):
                    is_target = (number, place) in program.targets
                    if is_target:
                        reads[number, place] = get(model, place)
                    for edit in invoke.edits:
                        if edit.place == place:
                            _write(tracer, model, edit, reads, vectors)
                    if not is_target and program.is_read((number, place)):
                        reads[number, place] = get(model, place)
        for loss in program.losses:
            parts = [(reads[spot][:, -1] @ weighting(spot[1], seed)).tanh().sum() for spot, seed in loss]
            with sum(parts[1:], parts[0]).backward():
                if program.halved is not None:
                    halved = reads[program.targets[program.halved]]
                    halved.grad = halved.grad * 0.5
                for target in program.targets:
                    reads[target].grad.save()
                for vector in vectors:
                    vector.grad.save()
    return tracer


def _write(tracer: Any, model: Any, edit: Edit, reads: dict[Spot, Any], vectors: list[Any]) -> None:
    added = None
    if edit.kind == "add":
        added = tracer.value(edit.vector())
        vectors.append(added)
    elif edit.source is not None:
        added = reads[edit.source][:, -1].mean(0)
    owner = model
    for name in edit.place.module.split("."):
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    value = get(model, edit.place)
    if edit.in_place:
        value += added
    elif edit.place.selector:
        members = getattr(owner, edit.place.port)
        setattr(owner, edit.place.port, (edit.apply(value, added), *members[1:]))
    else:
        setattr(owner, edit.place.port, edit.apply(value, added))


# --- by hand


def run_by_hand(plain: Any, program: GradientProgram) -> list[Tensor]:
    """Every gradient, with plain hooks; prompts of an invoke run one by one, and are left-padded with zeros."""
    seen: dict[tuple[int, int, Place], Tensor] = {}
    halves: dict[tuple[int, int, Place], list[Tensor]] = {}  # of the target that is halved: what it becomes, by loss
    vectors: list[Tensor] = []
    for number, invoke in enumerate(program.invokes):
        added = {}
        for place in program.places(number):
            for edit in invoke.edits:
                if edit.place == place and edit.kind == "add":
                    added[edit] = edit.vector().requires_grad_()
                    vectors.append(added[edit])
                elif edit.place == place and edit.source is not None:
                    one, at = edit.source
                    count = len(program.invokes[one].prompts)
                    added[edit] = torch.stack([seen[one, prompt, at][0, -1] for prompt in range(count)]).mean(0)
        for number_of_prompt, prompt in enumerate(invoke.prompts):
            with hooked(plain, program, number, number_of_prompt, added, seen, halves):
                plain(torch.tensor([prompt]), use_cache=False)
    saved = []
    for loss in program.losses:
        total = torch.zeros(())
        for (one, at), seed in loss:
            for prompt in range(len(program.invokes[one].prompts)):
                total = total + (seen[one, prompt, at][0, -1] @ weighting(at, seed)).tanh()
        wanted = [seen[one, p, at] for one, at in program.targets for p in range(len(program.invokes[one].prompts))]
        for own in halves.values():
            own.clear()
        found = torch.autograd.grad(total, [*wanted, *vectors], retain_graph=True, allow_unused=True)
        grads = [
            torch.zeros_like(value) if grad is None else grad
            for value, grad in zip([*wanted, *vectors], found, strict=True)
        ]
        for place, (one, at) in enumerate(program.targets):
            own = [grads.pop(0)[0] for _ in program.invokes[one].prompts]
            if place == program.halved:  # whether autograd gives what came to a hook or what it left is its secret
                own = [
                    (halves.get((one, prompt, at)) or [torch.zeros_like(grad)])[-1] for prompt, grad in enumerate(own)
                ]
            longest = max(map(len, own))
            saved.append(torch.stack([F.pad(value, (0, 0, longest - len(value), 0)) for value in own]))
        saved += grads
    return saved


@contextmanager
def hooked(
    plain: Any,
    program: GradientProgram,
    number: int,
    prompt: int,
    added: dict[Edit, Tensor],
    seen: dict[tuple[int, int, Place], Tensor],
    halves: dict[tuple[int, int, Place], list[Tensor]],
) -> Iterator[None]:
    """Reads and edits of one invoke."""
    handles = []

    def at(place: Place, value: Any) -> Any:
        whole = value
        for key in place.selector:
            value = value[key]
        value = value if value.requires_grad else value.requires_grad_()
        spot = number, place
        if spot in program.targets:
            seen[number, prompt, place] = value
            if program.halved is not None and program.targets[program.halved] == spot:
                own = halves.setdefault((number, prompt, place), [])
                value.register_hook(lambda grad: own.append(grad[0] * 0.5) or grad * 0.5)
        after = value
        for edit in program.invokes[number].edits:
            if edit.place == place:
                after = edit.apply(after, added.get(edit))
        if spot not in program.targets:
            seen[number, prompt, place] = after
        return (after, *whole[1:]) if place.selector else after

    for place in program.places(number):
        module = plain.get_submodule(place.module)
        if place.port == "input":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, place=place: _with_first(args, kwargs, place, at), with_kwargs=True
                )
            )
        else:
            handles.append(module.register_forward_hook(lambda _m, _a, output, place=place: at(place, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_first(args: Any, kwargs: Any, place: Place, at: Any) -> Any:
    if args:
        return (at(place, args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, {**kwargs, name: at(place, kwargs[name])}


# --- drawn


@st.composite
def programs(draw: st.DrawFn, family: Family, most_invokes: int = 2) -> GradientProgram:
    """Every invoke has a part in every loss, so every target has a gradient."""
    number = draw(st.integers(1, most_invokes))
    token = st.integers(3, family.vocabulary - 1)
    invokes: list[Invoke] = []
    spot = st.builds(
        lambda layer, part: family.place(layer, part),
        st.integers(0, family.num_layers - 1),
        st.sampled_from(family.parts),
    )
    for one in range(number):
        prompts = draw(st.lists(st.lists(token, min_size=2, max_size=7).map(tuple), min_size=1, max_size=2))
        edits: dict[Place, Edit] = {}
        for place in draw(st.lists(spot, max_size=2, unique=True)):
            kind = draw(st.sampled_from(["add", "add", "scale", "freeze", *(["patch"] * 2 if one else [])]))
            source = None
            if kind == "patch":
                same = [part for part in family.parts if part[3] == place.width]
                at = family.place(draw(st.integers(0, family.num_layers - 1)), draw(st.sampled_from(same)))
                source = (draw(st.integers(0, one - 1)), at)
            edits[place] = Edit(kind, place, draw(st.integers(0, 99)), source)
        invokes.append(Invoke(tuple(prompts), tuple(edits.values())))
    targets = draw(st.lists(st.tuples(st.integers(0, number - 1), spot), min_size=1, max_size=3, unique=True))
    losses = []
    for _ in range(draw(st.integers(1, 2))):
        parts = [((one, family.logits()), draw(st.integers(0, 99))) for one in range(number)]
        losses.append(tuple(parts))
    halved = draw(st.none() | st.integers(0, len(targets) - 1))
    return GradientProgram(tuple(invokes), tuple(targets), tuple(losses), halved)
