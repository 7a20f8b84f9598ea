"""Random interpretability programs as polytrace traces. What they must give is told by `by_hand`.

Programs of one *crowd* are drawn from a pool of prompts that are equal up to some token, and begin with edits that
others make too: so their rows are shared, fork, fork again, and end at different depths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from families import Family, Place
from hypothesis import strategies as st
from torch import Tensor

from polytrace.certificate import Receipt
from polytrace.graph import Save
from scheduling.policy import PassPolicy
from scheduling.scheduler import Scheduler

Prompt = tuple[int, ...]


@dataclass(frozen=True)
class At:
    """Columns of a view: one, a slice, some, or all."""

    one: int | None = None
    start: int | None = None  # of a slice, to `stop`
    stop: int | None = None
    some: tuple[int, ...] = ()

    @property
    def index(self) -> Any:
        if self.one is not None:
            return self.one
        return list(self.some) if self.some else slice(self.start, self.stop)

    def columns(self, longest: int) -> list[int]:
        """The columns of a view with so many, in order of the index."""
        found = range(longest)[self.index] if not self.some else [range(longest)[place] for place in self.some]
        return [found] if isinstance(found, int) else list(found)


EVERYWHERE = At()


@dataclass(frozen=True)
class Source:
    """A value for another invoke: one column, averaged over the prompts."""

    invoke: int
    place: Place
    at: At


@dataclass(frozen=True)
class Action:
    """One thing a user does at a place. `kind` says which fields count."""

    kind: str  # read, lens (of one column), add, fill, scale (of all), patch
    place: Place
    at: At = EVERYWHERE
    features: tuple[int, int] | None = None  # add, fill: from, to
    seed: int = 0  # add
    value: float = 0.0  # fill
    source: Source | None = None  # patch

    @property
    def is_edit(self) -> bool:
        return self.kind in ("add", "fill", "scale", "patch")

    @property
    def span(self) -> slice:
        return slice(*self.features) if self.features else slice(None)


@dataclass(frozen=True)
class Program:
    """Prompts and actions of each invoke; the last logits of every invoke are saved besides."""

    family: Family
    prompts: tuple[tuple[Prompt, ...], ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def has_edits(self) -> bool:
        return any(action.is_edit for each in self.actions for action in each)

    def sources(self, invoke: int) -> list[Source]:
        """What later invokes take from one, in order, each once."""
        wanted = [a.source for each in self.actions for a in each if a.source and a.source.invoke == invoke]
        return list(dict.fromkeys(wanted))


@dataclass(frozen=True)
class Pool:
    """What a crowd has in common."""

    prompts: tuple[Prompt, ...]
    places: tuple[Place, ...]
    edits: tuple[Action, ...]  # programs begin with the first few of them


# Drawn


def places(family: Family) -> st.SearchStrategy[Place]:
    """Sites of the layers mostly, the final norm's input and the logits sometimes."""
    in_layers = st.builds(family.place, st.integers(0, family.num_layers - 1), st.sampled_from(family.parts))
    around = [Place(family.norm, "input", (), family.width), family.logits()]
    return st.one_of(in_layers, in_layers, in_layers, st.sampled_from(around))


@st.composite
def programs(draw: st.DrawFn, family: Family, pool: Pool | None = None) -> Program:
    """One user's program: one to three invokes of one to three prompts, each with up to five actions."""
    num_invokes = draw(st.sampled_from([1, 1, 2, 3] if pool else [1, 2]))
    alone = st.lists(st.integers(1, family.vocabulary - 1), min_size=1, max_size=9).map(tuple)
    prompt = st.sampled_from(pool.prompts) if pool else alone
    prompts = tuple(
        tuple(draw(prompt) for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3])))) for _ in range(num_invokes)
    )
    actions = []
    for invoke in range(num_invokes):
        shared = pool.edits[: draw(st.integers(0, len(pool.edits)))] if pool else ()
        own: list[Action] = []
        for _ in range(draw(st.integers(0 if pool else 1, 4))):
            own.extend(draw(_actions(family, invoke, min(map(len, prompts[invoke])), pool)))
        actions.append((*shared, *own))
    return Program(family, prompts, tuple(actions))


@st.composite
def crowds(draw: st.DrawFn, family: Family, size: int) -> list[Program]:
    """Programs of one pool."""
    pool = draw(_pools(family))
    return [draw(programs(family, pool)) for _ in range(size)]


@st.composite
def _pools(draw: st.DrawFn, family: Family) -> Pool:
    token = st.integers(1, family.vocabulary - 1)
    length = draw(st.sampled_from([6, 9, 14, 34]))
    base = tuple(draw(st.lists(token, min_size=length, max_size=length)))
    changed = draw(st.integers(0, length - 1))
    prompts = (
        base,
        base,
        base + tuple(draw(st.lists(token, min_size=2, max_size=2))),
        base[: draw(st.integers(4, length))],
        (*base[:changed], base[changed] % (family.vocabulary - 1) + 1, *base[changed + 1 :]),
        (*base[:-1], base[-1] % (family.vocabulary - 1) + 1),
    )
    edits = tuple(draw(_edits(family, min(map(len, prompts)), draw(places(family)))) for _ in range(3))
    return Pool(prompts, tuple(draw(places(family)) for _ in range(3)), edits)


@st.composite
def _actions(draw: st.DrawFn, family: Family, invoke: int, shortest: int, pool: Pool | None) -> list[Action]:
    """One action, or reads of one column at every layer."""
    layer = st.integers(0, family.num_layers - 1)
    kind = draw(st.sampled_from(["read", "edit", "edit", "scale", "lens", "columns"] + ["patch"] * 2 * bool(invoke)))
    place = draw(st.one_of(st.sampled_from(pool.places), places(family)) if pool else places(family))
    if kind == "patch":
        source = Source(
            draw(st.integers(0, invoke - 1)),
            family.residual(draw(layer)),
            At(one=-draw(st.integers(1, 2) if pool else st.just(1))),
        )
        target = family.residual(draw(layer))
        return [Action("patch", target, _single(draw, shortest), source=source)]
    if kind == "lens":
        return [Action("lens", family.residual(draw(layer)), At(one=-draw(st.integers(1, shortest))))]
    if kind == "columns":
        at = _single(draw, shortest)
        return [Action("read", family.residual(layer), at) for layer in range(family.num_layers)]
    if kind == "read":
        return [Action("read", place, _columns(draw, shortest))]
    if kind == "scale":
        return [Action("scale", place)]
    return [draw(_edits(family, shortest, place))]


@st.composite
def _edits(draw: st.DrawFn, family: Family, shortest: int, place: Place) -> Action:
    """A vector added, half of the features or a head put out."""
    kind = draw(st.sampled_from(["add", "add", "half", "head"]))
    at = _columns(draw, shortest)
    if kind == "add":
        return Action("add", place, at, seed=draw(st.integers(0, 2)))
    if kind == "half":
        return Action("fill", place, at, features=(0, place.width // 2))
    size = family.width // family.num_heads
    head = draw(st.integers(0, family.num_heads - 1))
    heads = family.heads(draw(st.integers(0, family.num_layers - 1)))
    return Action("fill", heads, at, features=(head * size, (head + 1) * size))


def _single(draw: st.DrawFn, shortest: int) -> At:
    return At(one=draw(st.sampled_from([-1, 0, shortest // 2, -shortest])))


def _columns(draw: st.DrawFn, shortest: int) -> At:
    middle = shortest // 2
    slices = [At(start=middle), At(start=-min(2, shortest)), At(start=0, stop=middle + 1), EVERYWHERE]
    return draw(st.one_of(st.just(_single(draw, shortest)), st.sampled_from([*slices, At(some=(0, -1))])))


def vector(seed: int, width: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(width, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


# As traces


def find(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    return model


def get(model: Any, place: Place) -> Any:
    value = getattr(find(model, place.module), place.port)
    for key in place.selector:
        value = value[key]
    return value


def record(model: Any, program: Program, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, list[Any]]:
    """Writes the program as a user would; returns the tracer and the saved values, in the order of `run_by_hand`."""
    with model.trace(**options) as tracer:
        saved = record_in(tracer, model, program, dtype)
    return tracer, saved


def record_in(
    tracer: Any,
    model: Any,
    program: Program,
    dtype: torch.dtype = torch.float32,
    then: Callable[[], None] = lambda: None,
) -> list[Any]:
    """The program in a trace that is open, and `then` what else the last invoke does."""
    saved: list[Any] = []
    sources: dict[Source, Any] = {}
    for invoke, prompts in enumerate(program.prompts):
        with tracer.invoke([list(prompt) for prompt in prompts]):
            for source in program.sources(invoke):
                sources[source] = get(model, source.place)[:, source.at.index].mean(0)
            for action in program.actions[invoke]:
                saved.extend(_act(model, program.family, action, sources, dtype))
            if invoke == len(program.prompts) - 1:
                then()
            saved.append(get(model, program.family.logits())[:, -1].save())
    return saved


def _act(
    model: Any, family: Family, action: Action, sources: Mapping[Source, Any], dtype: torch.dtype
) -> Iterator[Any]:
    place, index = action.place, (slice(None), action.at.index)
    if action.kind == "read":
        whole = get(model, place)
        yield (whole if action.at == EVERYWHERE else whole[index]).save()
    elif action.kind == "lens":
        head = find(model, family.logits().module)
        yield head(find(model, family.norm)(get(model, place)[index])).save()
    elif action.kind == "add":
        get(model, place)[(*index, action.span)] += vector(action.seed, place.width, dtype)[action.span]
    elif action.kind == "fill":
        get(model, place)[(*index, action.span)] = action.value
    elif action.source is not None:
        get(model, place)[index] = sources[action.source]
    elif place.selector:
        get(model, place)[:] = get(model, place) * 1.5
    else:
        setattr(find(model, place.module), place.port, get(model, place) * 1.5)


# Served


@dataclass(frozen=True)
class Served:
    """One user's outcome: saved values in the order they were written, and the receipt."""

    values: list[Tensor]
    receipt: Receipt

    def has_bits_of(self, other: Served) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.values, other.values, strict=True))


def serve(model: Any, backend: Any, users: Sequence[Program], dtype: torch.dtype, **options: Any) -> list[Served]:
    """All users at once, merged as far as the backend's pass policy lets them."""
    tracers = [record(model, program, dtype, run=False, **options)[0] for program in users]
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [
        Served(values_in_order(tracer, outcome.values), outcome.receipt)
        for tracer, outcome in zip(tracers, outcomes, strict=True)
    ]


@contextmanager
def few_rows(backend: Any, rows: int, trunk_bytes: int | None = None) -> Iterator[None]:
    """Passes of a backend take so many rows inside; and its shards keep so many bytes of trunks, or as many as ever."""
    description, scheduler = backend.description, backend.scheduler
    limits = replace(description.limits, pass_tokens=rows)
    if trunk_bytes is not None:
        limits = replace(limits, trunk_bytes=trunk_bytes)
    backend.description = replace(description, limits=limits)
    backend.scheduler = Scheduler(backend.description, PassPolicy(budget_tokens=rows))
    try:
        yield
    finally:
        backend.description, backend.scheduler = description, scheduler


def values_in_order(tracer: Any, values: Mapping[str, Tensor]) -> list[Tensor]:
    """The values of a request that ran without its tracer, in the order its saves were written."""
    return [values[node.name] for node in tracer.request.graph.nodes if isinstance(node, Save)]


def rows_run(served: Sequence[Served]) -> int:
    """Rows x layers of all passes that some requests were part of, each pass once."""
    passes = {entry.pass_id: entry.layer_rows for each in served for entry in each.receipt.passes}
    return sum(map(sum, passes.values()))


def difference(ours: Sequence[Tensor], by_hand: Sequence[Tensor]) -> float:
    """Largest `max|a - b| / max(1, max|b|)` over saved values."""
    worst = 0.0
    for value, plain in zip(ours, by_hand, strict=True):
        assert value.shape == plain.shape, (value.shape, plain.shape)
        scale = max(1.0, plain.float().abs().max().item())
        worst = max(worst, (value.float() - plain.float()).abs().max().item() / scale)
    return worst
