"""What became of a request in its passes: did everything fire, what did it cost, what went where.

Owns the reading of `ShardResult`s. Only rank 0 of each stage is asked what fired: all its ranks run the same nodes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from polytrace.certificate import Fired, PassEntry, Receipt
from polytrace.errors import RunError
from polytrace.graph import (
    LOG,
    NodeId,
    Port,
    Read,
    Save,
    SiteGrad,
    Write,
)
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
from scheduling.generating import Generating
from scheduling.plan import Failure, Member, Plan, Program, RequestId, SaveSlot, ShardResult
from scheduling.step_costs import step_costs
from scheduling.step_saves import came_out, slot_at
from scheduling.steps import GENERATE


def find_error(
    program: Program, member: Member, results: tuple[ShardResult, ...], known: set[Hashable]
) -> RunError | None:
    """Why the request failed in this wave: what a shard reported, else what was planned and did not fire.

    `known` is the request's own: what was found to be whole, as most steps of a generation are the same way.
    """
    failed = [
        (failure.node is None, result.stage, result.rank, failure.node or 0, failure)
        for result in results
        for failure in result.failures
        if failure.request == program.request
    ]
    if failed:
        return _told(program, min(failed, key=lambda entry: entry[:-1])[-1])
    fired = {result.stage: result.fired.get(program.request, ()) for result in results if result.rank == 0}
    key = (id(program), member.wave, member.absent, tuple(sorted(fired.items())))
    if key in known:
        return None
    for stage, work in enumerate(program.waves[member.wave].stages):
        here = set(fired.get(stage, ()))
        for fragment in work.fragments:
            for node in fragment.nodes:
                event = program.graph.nodes[node]
                if isinstance(event, (Read, Write, Save, SiteGrad)) and node not in here and node not in member.absent:
                    return RunError(f"{_name(event)} did not fire", where=event.where)
    known.add(key)
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


def pass_entry(plan: Plan, results: tuple[ShardResult, ...], table: ModelTable, requests: int) -> PassEntry:
    """A pass that so many requests shared, in the books of each."""
    begun = table.levels.begun(plan.until)  # the pass ended in the last of these layers
    return PassEntry(
        pass_id=plan.pass_id,
        requests=requests,
        tokens=sum(plan.layer_rows[:1]),
        layer_rows=tuple(rows if layer < begun else 0 for layer, rows in enumerate(plan.running_rows)),
        seconds=max((result.seconds for result in results), default=0.0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """A saved value that its user wants to see while the request runs."""

    passes_done: int  # with the pass that made it
    slot: SaveSlot


def values_of(results: tuple[ShardResult, ...]) -> dict[RequestId, dict[str, Any]]:
    """The saves that came back with the shards' answers, by request."""
    found: dict[RequestId, dict[str, Any]] = {}
    for result in results:
        for (request, name), value in result.values.items():
            found.setdefault(request, {})[name] = value
    return found


def moved_in(results: tuple[ShardResult, ...], request: RequestId) -> int:
    """Bytes that a pass moved for one request: gathered by ranks, and saved."""
    return sum(result.gathered.get(request, 0) + result.saved_bytes.get(request, 0) for result in results)


class Account:
    """One request's books, pass by pass."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Any] = {}  # saves, when the program has no result file
        self._entries: list[PassEntry] = []
        self._runs: dict[tuple[int, tuple[NodeId, ...]], _Run] = {}  # by program and what fired
        self._saved_bytes = 0
        self._gathered_bytes = 0
        self.logs: list[Logged] = []  # in the order of their passes
        self.saves: list[SaveSlot] = []  # of a generation: those that came, where they are in the result
        self._loaded_bytes = 0
        self.whole: set[Hashable] = set()  # see `find_error`

    @property
    def num_passes(self) -> int:
        return len(self._entries)

    def enter(
        self,
        entry: PassEntry,
        results: tuple[ShardResult, ...],
        program: Program | None = None,
        step: int = 0,
        offset: int = 0,
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Takes in a pass that went well; `program` is what ran, when that is a step of a generation, whose saves are
        counted from `offset` on. `values` are its saves, when there is no result file.
        """
        program = program or self.program
        request = program.request
        self._entries.append(entry)
        self.values.update(values)
        for result in results:
            self._gathered_bytes += result.gathered.get(request, 0)
            self._saved_bytes += result.saved_bytes.get(request, 0)
            self._loaded_bytes += result.loaded.get(request, 0)
            if result.rank == 0:
                run = self._run(program, result.fired.get(request, ()))
                run.steps.append(step)
                for event, planned in run.told:
                    slot = came_out(slot_at(planned, step, offset), result.shapes, request)
                    if self.program.chain is not None:
                        self.saves.append(slot)
                    if event.name.startswith(LOG):
                        self.logs.append(Logged(passes_done=len(self._entries), slot=slot))

    def _run(self, program: Program, fired: tuple[NodeId, ...]) -> _Run:
        """What fired, and whenever else that did: most steps of a generation do the same."""
        key = id(program), fired
        if key not in self._runs:
            slots = {slot.node: slot for slot in program.saves}
            saves = [(event, slots[node]) for node in fired if isinstance(event := program.graph.nodes[node], Save)]
            is_chain = self.program.chain is not None
            told = [(event, slot) for event, slot in saves if is_chain or event.name.startswith(LOG)]
            self._runs[key] = _Run(program, fired, told)
        return self._runs[key]

    def _firings(self) -> Iterable[_Firings]:
        """Reads and writes, by node, of a generation by line."""
        is_chain = self.program.chain is not None
        found: dict[object, _Firings] = {}
        for run in self._runs.values():
            for node in run.fired:
                event = run.program.graph.nodes[node]
                if not isinstance(event, (Read, Write)) or (event.site.port is Port.TOKEN and event.where == GENERATE):
                    continue
                key = (type(event), event.site, event.invoke, event.where) if is_chain else node
                firings = found.setdefault(key, _Firings(event))
                firings.passes += len(run.steps)
                firings.steps.update(run.steps)
        return found.values()

    def receipt(
        self,
        table: ModelTable,
        *,
        is_keeping: bool,
        queue_seconds: float,
        run_seconds: float,
        generating: Generating | None = None,
        spared: int = 0,
    ) -> Receipt:
        """The books, closed; `spared` are rows x layers that need not run thanks to kept prefixes."""
        program = self.program
        steps = step_costs(program, [] if generating is None else generating.rows_of_steps, table)
        kept_bytes = sum(slot.facts.num_bytes for slot in program.saves if slot.keep is not None)
        return Receipt(
            request=program.request,
            model=table.description.name,
            passes=tuple(self._entries),
            tokens=steps.tokens + sum(wave_tokens(program, wave) for wave in program.waves),
            token_layers=steps.token_layers + token_layers(program, table, is_keeping=is_keeping) - spared,
            token_layers_alone=steps.token_layers + token_layers_alone(program, table),
            fired=tuple(_told_firings(self._firings(), 1 if generating is None else generating.num_steps)),
            generated=() if generating is None else tuple(generating.generated()),
            pad_rows_written=pad_rows_written(program),
            read_bytes=steps.read_bytes + read_bytes(program),
            result_bytes=self._saved_bytes - kept_bytes,
            kept_bytes=kept_bytes,
            tape_bytes=program.tape_bytes,
            loaded_bytes=self._loaded_bytes,
            carried_bytes=steps.carried_bytes + carried_bytes(program, table),
            gathered_bytes=self._gathered_bytes,
            queue_seconds=queue_seconds,
            run_seconds=run_seconds,
            notes=find_notes(program, table),
            edits=program.edits,
        )


@dataclass(slots=True)
class _Run:
    """Runs of a program in which the same fired."""

    program: Program
    fired: tuple[NodeId, ...]
    told: list[tuple[Save, SaveSlot]]  # saves that are told of: of a generation, and logs
    steps: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Firings:
    """A read or a write, and when it happened."""

    event: Read | Write
    passes: int = 0
    steps: set[int] = field(default_factory=set)


def _told_firings(fired: Iterable[_Firings], of_steps: int) -> Iterable[Fired]:
    for firings in fired:
        event = firings.event
        kind = "read" if isinstance(event, Read) else "write in place" if event.in_place else "write"
        yield Fired(
            site=str(event.site),
            invoke=event.invoke,
            kind=kind,
            passes=firings.passes,
            where=event.where,
            steps=len(firings.steps),
            of_steps=of_steps,
        )


def _told(program: Program, failure: Failure) -> RunError:
    where = None if failure.node is None else program.graph.nodes[failure.node].where
    return RunError(failure.message, where=where)


def _name(event: Read | Write | Save | SiteGrad) -> str:
    if isinstance(event, Save):
        return f"the save of {event.name!r}"
    if isinstance(event, SiteGrad):
        return "the gradient at this place"
    return f"the {'read of' if isinstance(event, Read) else 'write to'} {event.site}"
