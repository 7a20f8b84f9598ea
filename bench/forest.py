"""The picture of "a pass is a forest of token rows": four users' traces, merged by the scheduler, row by row.

    python -m bench.forest docs/forest.png

Owns who asks what, and what the plan of their pass says of each row: in which layers it is computed and for whom, where
it is read, saved and written. Nothing is drawn by hand: each cell is a row of the plan that the shard ran, and the
cells are counted against the users' receipts before `bench.forest_picture` draws them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import polytrace
from bench.experiments.experiment import first_token
from bench.forest_picture import Branch, Cell, Column, Kind, Mark, PassPicture, draw
from engine.direct import LocalShards
from engine.local import LocalBackend
from polytrace.certificate import Receipt
from polytrace.graph import NodeId, Read, Save, Write, operands
from scheduling.checks import ModelTable, table_of
from scheduling.columns import columns_of
from scheduling.plan import NO_ROWS, Plan, Program, View

FOLDER = Path(__file__).parent / "tinyworld" / "model"

_EIFFEL = "The Eiffel Tower is in the city of"
_NEEDLE = "The Space Needle is in the city of"  # as many tokens
_SEEN = "The Eiffel Tower can be seen in"  # begins as the first
_SWEPT_LAYERS, _SWEPT_POSITIONS = (1, 3, 5), (3, 5, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who asks for what."""

    name: str
    does: str  # for the legend
    record: Callable[[Any, Any], None]  # (the model, the open trace)


def lens(model: Any, tracer: Any) -> None:
    """What each layer would say next."""
    with tracer.invoke(_EIFFEL):
        for layer in model.model.layers:
            model.lm_head(model.model.norm(layer.output[0][:, -1])).argmax(-1).save()


def sweep(model: Any, tracer: Any) -> None:
    """Residuals of one prompt put into another, one layer and position at a time."""
    paris, seattle = (first_token(model, word) for word in (" Paris", " Seattle"))
    with tracer.invoke(_EIFFEL):
        clean = [model.model.layers[layer].output[0] for layer in _SWEPT_LAYERS]
    for layer, residual in zip(_SWEPT_LAYERS, clean, strict=True):
        for position in _SWEPT_POSITIONS:
            with tracer.invoke(_NEEDLE):
                model.model.layers[layer].output[0][:, position] = residual[:, position]
                logits = model.lm_head.output[:, -1]
                (logits[:, paris] - logits[:, seattle]).save()
    with tracer.invoke(_NEEDLE):
        logits = model.lm_head.output[:, -1]
        (logits[:, paris] - logits[:, seattle]).save()


def steered(model: Any, tracer: Any) -> None:
    """A token's direction added to the residual."""
    with tracer.invoke(_EIFFEL):
        direction = model.lm_head.weight[first_token(model, " Rome")]
        model.model.layers[4].output[0][:, 4:] += 4 * direction
        model.lm_head.output[:, -1].save()


def early(model: Any, tracer: Any) -> None:
    """What layer 2 gives, and nothing behind it."""
    with tracer.invoke(_SEEN):
        model.model.layers[2].output[0].save()


USERS = (
    User(name="Ada", does="logit lens", record=lens),
    User(name="Ben", does="patching sweep, 9 patches", record=sweep),
    User(name="Chen", does="steering", record=steered),
    User(name="Dara", does="reads layer 2", record=early),
)


class _Watched(LocalShards):
    """The model's own shard, whose plans are kept."""

    plans: tuple[Plan, ...] = ()

    def submit(self, plan: Plan) -> None:
        self.plans += () if plan.is_of_nobody else (plan,)
        super().submit(plan)


def one_pass(folder: Path = FOLDER) -> tuple[PassPicture, tuple[Receipt, ...]]:
    """What there is to draw of the one pass of all users' traces, and their receipts."""
    model: Any = polytrace.load(str(folder))
    backend = model.backend
    assert isinstance(backend, LocalBackend)
    try:
        backend.shards = watched = _Watched(backend.shard)
        programs = [_program(model, backend, user) for user in USERS]
        outcomes = backend.run_together(programs)
        for outcome in outcomes:
            if outcome.error is not None:
                raise outcome.error
        receipts = tuple(outcome.receipt for outcome in outcomes if outcome.receipt is not None)
        (plan,) = watched.plans
        rows = _Rows(plan, table_of(backend.description), programs)
        picture = PassPicture(
            users=tuple((user.name, user.does) for user in USERS),
            columns=rows.columns(lambda token: str(model.tokenizer.decode([token], skip_special_tokens=False))),
            num_layers=len(plan.layer_rows),
            cells=tuple(rows.cells()),
            branches=tuple(rows.branches()),
            marks=tuple(rows.marks()),
            num_runs=sum(len(program.invokes) for program in programs),
            token_layers_alone=sum(receipt.token_layers_alone for receipt in receipts),
        )
    finally:
        model.close()
    check(picture, receipts)
    return picture, receipts


def check(picture: PassPicture, receipts: tuple[Receipt, ...]) -> None:
    """What is drawn is, layer by layer, what each receipt says that the pass computed, and somebody needs each cell."""
    places = {(cell.layer, cell.column) for cell in picture.cells}
    drawn = tuple(sum(layer == one for one, _ in places) for layer in range(picture.num_layers))
    for receipt in receipts:
        (entry,) = receipt.passes
        assert drawn == entry.layer_rows, f"{drawn} rows are drawn, and a receipt has {entry.layer_rows}"
    assert sum(drawn) == picture.token_layers, "a row is drawn twice"
    assert all(cell.users for cell in picture.cells), "a row is computed that nobody needs"


def _program(model: Any, backend: LocalBackend, user: User) -> Program:
    with model.trace(run=False) as tracer:
        user.record(model, tracer)
    return backend.work_out(tracer.request)


class _Rows:
    """A plan, read row by row. A row is a segment's at a position; it has one column at all layers."""

    def __init__(self, plan: Plan, table: ModelTable, programs: Sequence[Program]) -> None:
        """`programs`: each user's, as it was before the plan; a shard's copy has no cones."""
        self._plan, self._table, self._programs = plan, table, programs
        named = {program.request: user for user, program in enumerate(programs)}
        self._users = [named[member.program.request] for member in plan.members]
        self._num_layers = len(plan.layer_rows)
        self._places: list[tuple[int, int]] = []  # of the columns: segment and position
        for number, segment in enumerate(plan.segments):
            spans = zip(segment.starts, segment.stops, strict=False)
            own = {position for start, stop in spans for position in range(start, stop)}
            self._places += [(number, position) for position in sorted(own.union(segment.head))]
        self._column = {place: column for column, place in enumerate(self._places)}

    def columns(self, text: Callable[[int], str]) -> tuple[Column, ...]:
        """The rows of the stream, in its order."""
        tokens: dict[tuple[int, int], int] = {}
        for view, user, sequence, number in self._sequences():
            for position, token in enumerate(self._programs[user].invokes[view.invoke].sequences[sequence]):
                for level in range(self._num_layers + 1):
                    tokens[self._owner(number, position, level), position] = token
        return tuple(
            Column(segment=segment, position=position, text=text(tokens[segment, position]))
            for segment, position in self._places
        )

    def cells(self) -> Iterator[Cell]:
        """Every row of every layer, for whom it is: for all whose cones it lies in."""
        needed: dict[tuple[int, int], set[int]] = {}
        for view, user, sequence, number in self._sequences():
            wave = self._programs[user].waves[self._plan.members[view.member].wave]
            cone = wave.cones[wave.invokes.index(view.invoke)][sequence]
            for layer, stop in enumerate(cone.needs):
                for position in range(stop):
                    column = self._column[self._owner(number, position, layer), position]
                    needed.setdefault((layer, column), set()).add(user)
        for number, segment in enumerate(self._plan.segments):
            for layer in range(self._num_layers):
                if layer not in segment.skips:
                    for position in range(segment.starts[layer], segment.stops[layer]):
                        column = self._column[number, position]
                        users = tuple(sorted(needed.pop((layer, column), ())))
                        yield Cell(column=column, layer=layer, users=users)
        assert not needed, "a row that somebody needs is computed"

    def branches(self) -> Iterator[Branch]:
        """Where forks begin: at their first layer, behind a token that is the parent's or as a copy of its row."""
        for number, segment in enumerate(self._plan.segments):
            if segment.parent is not None:
                spans = zip(segment.starts, segment.stops, strict=False)
                layer = next(layer for layer, (start, stop) in enumerate(spans) if start < stop)
                start = segment.starts[layer] if layer else segment.starts[0] - 1
                source = self._owner(segment.parent, start, max(0, layer - 1)), start
                target = number, segment.starts[layer]
                yield Branch(source=self._column[source], target=self._column[target], layer=layer)

    def marks(self) -> Iterator[Mark]:
        """Where values are read, saved and written, each place once for each user."""
        found = dict.fromkeys(chain.from_iterable(map(self._marks_of, self._sequences())))
        saved = {(one.column, one.layer, one.user) for one in found if one.kind is Kind.SAVED}
        for mark in found:
            if mark.kind is not Kind.READ or (mark.column, mark.layer, mark.user) not in saved:
                yield mark

    def _marks_of(self, place: tuple[View, int, int, int]) -> Iterator[Mark]:
        view, user, _, number = place
        program, levels = self._programs[user], self._table.levels
        kinds = kinds_of(program)
        for node, kind in kinds.items():
            event = program.graph.nodes[node]
            assert isinstance(event, (Read, Write))
            if event.invoke == view.invoke:
                order = self._table.site(event.site, "reads", event.where)[0].order
                level = levels.acts_from(order) if kind is Kind.WRITTEN else levels.of(order)
                for position in columns_of(program.narrowed, node, program.invokes[event.invoke]):
                    column = self._column[self._owner(number, position, level), position]
                    yield Mark(kind=kind, column=column, layer=level, user=user)

    def _sequences(self) -> Iterator[tuple[View, int, int, int]]:
        """Each sequence: its view, whose it is, which of the view's, and its segment."""
        for view in self._plan.views:
            for sequence, number in enumerate(view.segments):
                assert number != NO_ROWS
                yield view, self._users[view.member], sequence, number

    def _owner(self, number: int, position: int, level: int) -> int:
        """The segment that has a sequence's row: its own, or the nearest that it forks from."""
        while position < self._plan.segments[number].starts[level]:
            parent = self._plan.segments[number].parent
            assert parent is not None
            number = parent
        return number


def kinds_of(program: Program) -> Mapping[NodeId, Kind]:
    """What a program's reads and writes are to its user. What in-place code begins with is no read of its own."""
    nodes = program.graph.nodes
    found: dict[NodeId, Kind] = {}
    for number, node in enumerate(nodes):
        if isinstance(node, Read):
            found.setdefault(NodeId(number), Kind.READ)
        elif isinstance(node, Write):
            found[NodeId(number)] = Kind.WRITTEN
            for read in _reads_of(program, NodeId(number)):
                event = nodes[read]
                if isinstance(event, Read) and (event.site, event.invoke) == (node.site, node.invoke):
                    found.pop(read, None)
        elif isinstance(node, Save):
            found.update(dict.fromkeys(_reads_of(program, NodeId(number)), Kind.SAVED))
    return found


def _reads_of(program: Program, node: NodeId) -> set[NodeId]:
    """The reads that a node's value is made of."""
    found: set[NodeId] = set()
    pending = [node]
    while pending:
        number = pending.pop()
        if isinstance(program.graph.nodes[number], Read):
            found.add(number)
        pending.extend(operands(program.graph.nodes[number]))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="one pass of four users, drawn from its plan")
    parser.add_argument("path", type=Path, nargs="?", default=Path("docs/forest.png"))
    path = parser.parse_args().path
    picture, _ = one_pass()
    draw(path, picture)
    alone = picture.token_layers_alone
    print(f"{path}: {picture.token_layers} token-layers, and {alone} if each of {picture.num_runs} runs ran alone")


if __name__ == "__main__":
    main()
