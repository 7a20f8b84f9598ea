"""The window of a pass, with every graph's fragments at their visits: forwards, or back for gradients.

Owns what a visit does, by its side and by what the pass is for. How the layers themselves run is `engine.stage`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from engine.arguments import Selector
from engine.attended import Attended
from engine.attention import AttentionPass
from engine.crossings import Crossings
from engine.fragments import RequestState, ShardContext
from engine.gradient_port import GradientPort
from engine.image_rows import SeenImages
from engine.next_tokens import NextTokens
from engine.row_tables import PassTables, RowTables
from engine.site_rows import rows_at, rows_back
from engine.spans import SpanStore
from engine.stage import PackedRows, Visit
from engine.streams import Streams
from engine.tape import Place as TapePlace
from engine.tape import Tape, row_leaves_of
from engine.tapes import Tapes
from engine.trunks import Trunks
from engine.writes import PortValue, apply_writes
from polytrace.description import ModelDescription, logits_of
from polytrace.graph import Port
from scheduling.plan import PROLOGUE, Fragment, PassId, Plan, StageWork


class Visiting:
    """Of one shard that knows its deployment's description."""

    def __init__(
        self,
        context: ShardContext,
        description: ModelDescription,
        row_tables: RowTables,
        store: SpanStore,
        tapes: Tapes,
        crossings: Crossings,
    ) -> None:
        self._context = context
        self._links = context.links
        self._device = context.device
        self._row_tables = row_tables
        self._store = store
        self._tapes = tapes
        self._crossings = crossings
        self._ports = {info.order: ((info.module, ""), info.port) for info in description.sites}
        self._layouts = {info.order: info.layouts for info in description.sites if info.layouts}
        self._row_leaves = {info.order: row_leaves_of(info) for info in description.sites}
        logits = logits_of(description.sites)
        self._logits = None if logits is None else (logits[0].rows, logits[1])

    def forwards(
        self,
        plan: Plan,
        streams: Streams,
        states: list[RequestState],
        works: list[StageWork],
        hidden: Tensor | None,
    ) -> Tensor | None:
        """From the hidden rows of the stage before, None on the first, to those for the stage behind."""
        if self._links.stage >= plan.num_stages:
            return None
        at = _by_order(states, works)
        tables = self._row_tables.of_pass(states, streams)
        tape = self._tapes.begin(plan, states, self._context.levels) if plan.cuts else None
        trunks = Trunks(streams, self._store)
        attention = AttentionPass(
            plan.pass_id, self._store, self._device, trunks if plan.keeps or plan.grows or streams.trunks else None
        )
        attention.is_taped = tape is not None
        rows = PackedRows(streams=streams, attention=attention, trunks=trunks, tape=tape, images=SeenImages(states))
        is_last = self._links.stage == plan.num_stages - 1
        if is_last and plan.until != PROLOGUE:
            at.setdefault(plan.until, [])  # nobody reads or writes there when the pass goes on for what it keeps
        if tape is not None:
            if hidden is not None:
                hidden = tape.receive(hidden, has_seam=self._crossings.stage_of(min(plan.cuts)) < self._links.stage)
            for order in plan.cuts:
                if self._crossings.stage_of(order) == self._links.stage:
                    at.setdefault(order, [])
        visits = [
            Visit(
                order=order,
                module=module,
                operation=operation,
                port=port,
                visitor=self._visitor(fragments, tables, rows, order)
                if port is not Port.TOKEN
                else self._token_visitor(plan, states, fragments, tables, rows, order),
                rows=self._rows_at(order, fragments, states, tape) if port.is_of_pairs else (),
                layouts=self._layouts.get(order, {}),
            )
            for order, fragments in at.items()
            for (module, operation), port in (self._port(order),)
        ]
        hidden_out = self._context.runner.run(rows, hidden, visits, stop_after=plan.until if is_last else None)
        return hidden_out if tape is None or hidden_out is None else tape.hand_on(hidden_out)

    def backwards(
        self, of: PassId, states: list[RequestState], works: list[StageWork], gradient: Tensor | None
    ) -> Tensor | None:
        """The window of an earlier pass backwards: what comes of a gradient at its end to what came in."""
        at = _by_order(states, works)

        def run(order: int, port: GradientPort) -> None:
            for state, fragment in at.pop(order, ()):
                state.run(fragment, port)

        found = self._tapes.of(of).sweep(gradient, run)
        assert not at, "a gradient is looked at where the pass before has no seam"
        return found

    def _rows_at(
        self,
        order: int,
        fragments: Sequence[tuple[RequestState, Fragment]],
        states: Sequence[RequestState],
        tape: Tape | None,
    ) -> set[int]:
        """Rows for which the visit of an order is made: also those that are not read anew and have a gradient."""
        own = {row for state, fragment in fragments for row in rows_at(state, fragment)}
        return own if tape is None else own.union(*[rows_back(state, order) for state in states])

    def _port(self, order: int) -> tuple[tuple[str, str], Port]:
        """The module and the way inside of its source, and the side, of what has an order."""
        if order not in self._ports:
            self._ports[order], self._layouts[order] = self._context.table.sources.at(order)
        return self._ports[order]

    def _visitor(
        self, fragments: list[tuple[RequestState, Fragment]], tables: PassTables, rows: PackedRows, order: int
    ) -> Callable[[object], object]:
        levels = self._context.levels
        level, next_level = levels.of(order), levels.acts_from(order)
        streams, is_output, layouts = rows.streams, levels.is_output(order), self._layouts.get(order, {})
        if rows.tape is not None:
            return self._taped_visitor(fragments, rows.tape, order, layouts)
        side = self._port(order)[1]

        def visit(value: object) -> object:
            port = PortValue(value, rows.trunks.outputs(level) if is_output and streams.giving else None, layouts)
            if side.is_attended:
                port.attended = Attended(port.tensors[()], side, level, streams.inside(level), rows.trunks)
            for state, fragment in tables.run(order, fragments, port):
                state.run(fragment, port)
            if is_output:  # a layer's output: what is written to it belongs to the next level's rows
                hidden: Selector = () if isinstance(value, Tensor) else (0,)
                writes = port.take_writes(hidden)
                if writes:
                    rows.landing.setdefault(next_level, []).append(lambda after: apply_writes(after, writes))
            return port.result()

        return visit

    def _taped_visitor(
        self, fragments: list[tuple[RequestState, Fragment]], tape: Tape, order: int, layouts: Mapping[Selector, int]
    ) -> Callable[[object], object]:
        """In a pass that is run backwards later. What is written lands right there: all levels have the same rows."""
        if order not in self._row_leaves:
            self._row_leaves[order] = row_leaves_of(self._context.table.sources.site_at(order))
        selectors = self._row_leaves[order]
        place = TapePlace(order=order, port=self._port(order)[1], selectors=selectors, layouts=layouts)

        def run(port: PortValue) -> None:
            for state, fragment in fragments:
                state.run(fragment, port)

        return lambda value: tape.visit(place, value, run)

    def _token_visitor(
        self,
        plan: Plan,
        states: list[RequestState],
        fragments: list[tuple[RequestState, Fragment]],
        tables: PassTables,
        rows: PackedRows,
        order: int,
    ) -> Callable[[object], object]:
        """Draws what sequences go on with, which fragments may see and change."""
        assert self._logits is not None, "a model without logits has no tokens to be drawn"
        draws = [(state, fragment) for state, fragment in fragments if state.is_draw(fragment)]
        others = [(state, fragment) for state, fragment in fragments if not state.is_draw(fragment)]
        places = {id(state): place for place, state in enumerate(states)} if others else {}
        readers = {(places[id(state)], invoke) for state, fragment in others for invoke in state.reads_of(fragment)}
        next_tokens = NextTokens(plan.members, states, plan.views, *self._logits, self._links, self._device, readers)
        visit = self._visitor(others, tables, rows, order)

        def draw(output: object) -> object:
            after = next_tokens.visit(output, visit)
            for state, fragment in draws:
                state.note_draw(fragment)
            return after

        return draw


def _by_order(states: list[RequestState], works: list[StageWork]) -> dict[int, list[tuple[RequestState, Fragment]]]:
    """What runs at each visit; the prologue is none."""
    at: dict[int, list[tuple[RequestState, Fragment]]] = defaultdict(list)
    for state, work in zip(states, works, strict=True):
        for fragment in work.fragments:
            if fragment.order != PROLOGUE:
                at[fragment.order].append((state, fragment))
    return at
