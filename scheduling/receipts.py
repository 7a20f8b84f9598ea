"""What became of a request in its passes: did everything fire, what did it cost, what went where.

Owns the reading of `ShardResult`s. Only rank 0 of each stage is asked what fired: all its ranks run the same nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from polytrace.certificate import Fired, PassEntry, Receipt
from polytrace.errors import RunError
from polytrace.graph import LOG, NodeId, Read, Save, Write
from scheduling.checks import ModelTable
from scheduling.costs import (
    carried_bytes,
    find_notes,
    pad_rows_written,
    read_bytes,
    token_layers,
    token_layers_alone,
    wave_tokens,
)
from scheduling.plan import Failure, Plan, Program, SaveSlot, ShardResult


def find_error(program: Program, wave: int, results: tuple[ShardResult, ...]) -> RunError | None:
    """Why the request failed in this wave: what a shard reported, else what was planned and did not fire."""
    failed = [
        (failure.node is None, result.stage, result.rank, failure.node or 0, failure)
        for result in results
        for failure in result.failures
        if failure.request == program.request
    ]
    if failed:
        return _told(program, min(failed, key=lambda entry: entry[:-1])[-1])
    fired = {result.stage: result.fired.get(program.request, ()) for result in results if result.rank == 0}
    for stage, work in enumerate(program.waves[wave].stages):
        here = set(fired.get(stage, ()))
        for fragment in work.fragments:
            for node in fragment.nodes:
                event = program.graph.nodes[node]
                if isinstance(event, (Read, Write, Save)) and node not in here:
                    return RunError(f"{_name(event)} did not fire", where=event.where)
    return None


def find_out_of_memory(program: Program, results: tuple[ShardResult, ...]) -> Failure | None:
    """A failure of the request for want of memory, None when it had none."""
    return next(
        (
            failure
            for result in results
            for failure in result.failures
            if failure.request == program.request and failure.is_out_of_memory
        ),
        None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A saved value that its user wants to see while the request runs."""

    passes_done: int  # with the pass that made it
    slot: SaveSlot


class Account:
    """One request's books, pass by pass."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Any] = {}  # saves, when the program has no result file
        self._entries: list[PassEntry] = []
        self._passes_of: dict[NodeId, int] = {}  # reads and writes -> in how many passes they fired
        self._saved_bytes = 0
        self._gathered_bytes = 0
        self.logs: list[Logged] = []  # in the order of their passes
        self._loaded_bytes = 0

    def enter(self, plan: Plan, results: tuple[ShardResult, ...], table: ModelTable) -> None:
        """Takes in a pass that went well."""
        request, nodes = self.program.request, self.program.graph.nodes
        begun = table.levels.begun(plan.until)  # the pass ended in the last of these layers
        self._entries.append(
            PassEntry(
                pass_id=plan.pass_id,
                requests=len(plan.members),
                tokens=sum(plan.layer_rows[:1]),
                layer_rows=tuple(rows if layer < begun else 0 for layer, rows in enumerate(plan.running_rows)),
                seconds=max((result.seconds for result in results), default=0.0),
            )
        )
        for result in results:
            self._gathered_bytes += result.gathered.get(request, 0)
            self._saved_bytes += result.saved_bytes.get(request, 0)
            self._loaded_bytes += result.loaded.get(request, 0)
            self.values.update({name: value for (owner, name), value in result.values.items() if owner == request})
            if result.rank == 0:
                for node in result.fired.get(request, ()):
                    event = nodes[node]
                    if isinstance(event, (Read, Write)):
                        self._passes_of[node] = self._passes_of.get(node, 0) + 1
                    elif isinstance(event, Save) and event.name.startswith(LOG):
                        slot = next(slot for slot in self.program.saves if slot.node == node)
                        self.logs.append(Logged(passes_done=len(self._entries), slot=slot))

    def receipt(self, table: ModelTable, *, is_keeping: bool, queue_seconds: float, run_seconds: float) -> Receipt:
        """The books, closed."""
        program = self.program
        kept_bytes = sum(slot.facts.num_bytes for slot in program.saves if slot.keep is not None)
        return Receipt(
            request=program.request,
            model=table.description.name,
            passes=tuple(self._entries),
            tokens=sum(wave_tokens(program, wave) for wave in program.waves),
            token_layers=token_layers(program, table, is_keeping=is_keeping),
            token_layers_alone=token_layers_alone(program, table),
            fired=tuple(_fired(program, sorted(self._passes_of.items()))),
            pad_rows_written=pad_rows_written(program),
            read_bytes=read_bytes(program),
            result_bytes=self._saved_bytes - kept_bytes,
            kept_bytes=kept_bytes,
            loaded_bytes=self._loaded_bytes,
            carried_bytes=carried_bytes(program, table),
            gathered_bytes=self._gathered_bytes,
            queue_seconds=queue_seconds,
            run_seconds=run_seconds,
            notes=find_notes(program, table),
            edits=program.edits,
        )


def _fired(program: Program, counts: Iterable[tuple[NodeId, int]]) -> Iterable[Fired]:
    for node, passes in counts:
        event = program.graph.nodes[node]
        assert isinstance(event, (Read, Write))
        kind = "read" if isinstance(event, Read) else "write in place" if event.in_place else "write"
        yield Fired(site=str(event.site), invoke=event.invoke, kind=kind, passes=passes, where=event.where)


def _told(program: Program, failure: Failure) -> RunError:
    where = None if failure.node is None else program.graph.nodes[failure.node].where
    return RunError(failure.message, where=where)


def _name(event: Read | Write | Save) -> str:
    if isinstance(event, Save):
        return f"the save of {event.name!r}"
    return f"the {'read of' if isinstance(event, Read) else 'write to'} {event.site}"
