"""One shard: a window of layers on one rank, running plans.

Owns the order of things inside a pass on one shard. What goes from stage to stage is `engine.crossings`, what happens
at visits in the window `engine.visiting`. A pass is a straight story: take what other stages hold for it, run the
prologue, run the window with every graph's fragments at their visits, hand on hidden rows and carried values, report.
It never waits for the controller inside a pass, and every shard runs every transfer whatever happens.

Knows nothing of Ray, queues or HTTP. A plain class: `cluster.actors` makes it remote where it is launched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from engine import heap
from engine.chat import chat_format
from engine.checking import check_names
from engine.constants import Constants
from engine.crossings import Crossings
from engine.encoders import has_encoder, why_one_stage
from engine.fragments import RequestState, ShardContext
from engine.gate import Trial, WrongMannerError, run_gate
from engine.going_on import check_caches
from engine.image_rows import image_info
from engine.lanes import forbid_split_sums
from engine.links import Links
from engine.loading import ShardConfig, load_model, meta_model
from engine.memory import told_out_of_memory
from engine.named import NamedParameters
from engine.next_tokens import drawn_of
from engine.padded import PaddedRunner
from engine.placing import describe_model
from engine.probe import Probe, named_tensors, probe_model
from engine.proofs import Proof
from engine.reading import Report
from engine.reports import GateReport
from engine.results import MemorySink, Writer, sink_for
from engine.row_tables import RowTables
from engine.spans import SpanStore
from engine.splits import blocks_of
from engine.stage import StageRunner
from engine.stopwatch import Stopwatch
from engine.streams import Streams
from engine.tapes import Tapes
from engine.tokenizer import end_tokens
from engine.twins import prove_splits
from engine.views import InvokeRows
from engine.visiting import Visiting
from engine.withdrawing import with_checks
from polytrace.description import Limits, ModelDescription, PassLayout
from polytrace.errors import CapacityError, ServiceError
from polytrace.sources import SiteIndex
from scheduling.checks import table_of
from scheduling.levels import Levels
from scheduling.plan import PROLOGUE, PassTooLargeError, Phase, Plan, RequestId, ShardResult


class Shard:
    """The process that holds one (stage, rank) of a deployment. Construction is cheap; `start` loads weights."""

    def __init__(self, config: ShardConfig, links: Links) -> None:
        self.config = config
        self.links = links
        self.device = torch.device(config.device)
        self._states: dict[RequestId, RequestState] = {}
        self._writer = Writer()
        self._proven: Proof | None = None  # see `prove_splits`
        self._constants = Constants(self.device, config.constant_bytes)
        self._tapes = Tapes()

    def start(self, report: Report) -> None:
        """Reads this shard's weights, without the others. `report` gets lines for people, and how far reading is."""
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.device.type == "cuda":
            forbid_split_sums()
        self.probe: Probe = self._probed()
        self.loaded = load_model(self.config, self.links, report)
        self.store = SpanStore(self.config.kv_bytes, self.device)
        self.runner = self._new_runner()

    @property
    def files(self) -> tuple[str, ...]:
        """Those that its weights were read from."""
        return self.loaded.files

    def _probed(self) -> Probe:
        """ServiceError when the model cannot be cut as it is asked for."""
        meta = meta_model(self.config.source, self.config.dtype)
        self._images = image_info(meta)
        probe = probe_model(meta, why_padded="it has an encoder and a decoder" if has_encoder(meta) else None)
        if has_encoder(meta) and self.config.stages > 1:
            raise ServiceError(f"{why_one_stage(meta)}; use stages=1")
        if probe.manner.layout is PassLayout.PADDED and self.config.ranks > 1:
            raise ServiceError(f"{probe.class_name} cannot be split over ranks: {probe.why_padded}; use ranks=1")
        if probe.manner.layout is PassLayout.PADDED and self.config.stages > 1 and probe.left:
            # No stage alone can tell that other attention than the family's gives its logits.
            return probe_model(meta, probe.left[-1:], probe.why_padded)
        return probe

    def _new_runner(self) -> StageRunner:
        """As the probe found that the model runs."""
        self.probe.manner.prepare(self.loaded.model)
        kind = StageRunner if self.probe.manner.layout is PassLayout.PACKED else PaddedRunner
        return kind(self.loaded.model, self.loaded.window, keeps_rows=self.probe.has_kept_rows, views=self.probe.views)

    def gate(self, is_first: bool = True) -> GateReport:
        """Proves on the served weights that rows are their own; collective. ServiceError when they are not.

        It proves how ranks split the model as well, the first time and where a rank is new: what was proven of
        operations is the same then.
        """
        self.links.barrier()  # the others may read their files for much longer than a collective waits
        is_new = torch.tensor([is_first or (self.links.ranks > 1 and self._proven is None)])
        if bool(self.links.gather(is_new, 0).any()):
            self._proven = prove_splits(self.loaded.model.config, self.links, self.device)
        while True:
            try:
                return self._checked(self._gate())
            except WrongMannerError as error:
                if self.links.stages > 1 or self.links.ranks > 1:
                    told = "with stages=1 and ranks=1 it is served, each prompt alone"
                    raise ServiceError(f"{error.message}; {told}") from error
                if not self.probe.left:
                    raise
                meta = meta_model(self.config.source, self.config.dtype)
                self.probe = probe_model(meta, self.probe.left, self.probe.why_padded or error.message)
            self.runner = self._new_runner()

    def _gate(self) -> GateReport:
        return run_gate(
            self.probe,
            self.runner,
            self.links,
            self.store,
            self.device,
            packed=blocks_of(self.loaded.splits),
            proof=self._proven,
        )

    def _checked(self, report: GateReport) -> GateReport:
        """The report with what the served weights say of the names."""
        copies = {path: number for path, (_, number) in report.sharded.items()}
        parameters = NamedParameters(dict(named_tensors(self.loaded.model)), self.probe.weights, copies)
        trial = Trial(
            probe=self.probe,
            runner=self.runner,
            links=self.links,
            store=self.store,
            device=self.device,
            multiple=report.row_multiple,
            levels=Levels(self.probe.sites, self.probe.layout.layers),
            operations={},
        )
        if self.probe.manner.layout is PassLayout.PADDED:
            found = check_caches(trial)
            notes = report.notes if found.note is None else (*report.notes, found.note)
            report = replace(report, can_generate=found.can_generate, key_value_bytes=found.row_bytes, notes=notes)
        return replace(report, checks=check_names(trial, report, parameters))

    def describe(self, name: str, reports: Iterable[GateReport]) -> ModelDescription:
        """The deployment's description from every shard's gate report; any shard can make it."""
        told = tuple(reports)
        limits = Limits(max_sequence_tokens=self.probe.max_tokens, trunk_bytes=self.config.kv_bytes // 2)
        description = describe_model(
            self.probe, told, name=name, stages=self.links.stages, ranks=self.links.ranks, limits=limits
        )
        checked = with_checks(description, [check for report in told for check in report.checks])
        source = self.config.source
        return replace(checked, chat=chat_format(source), eos=end_tokens(source), images=self._images)

    def open(self, description: ModelDescription) -> None:
        """Takes the deployment's description; plans can run from now on."""
        model = self.loaded.model
        copies = {info.path: info.sharded_copies for info in description.parameters}
        self.context = ShardContext(
            runner=self.runner,
            links=self.links,
            sites=SiteIndex(description, table_of(description).sources),
            parameters=NamedParameters(dict(named_tensors(model)), self.probe.weights, copies),
            parameter_infos={info.path: info for info in description.parameters},
            table=table_of(description),
            levels=table_of(description).levels,
            device=self.device,
            constants=self._constants,
        )
        self.row_tables = RowTables(self.context)
        self._row_multiple = description.row_multiple
        self._crossings = Crossings(
            self.links,
            self.device,
            self._tapes,
            self.context.levels,
            first_layer=self.loaded.window.first,
            hidden_size=description.hidden_size,
            dtype=model.dtype,
        )
        self._visiting = Visiting(self.context, description, self.row_tables, self.store, self._tapes, self._crossings)

    def run(self, plan: Plan) -> ShardResult:
        """Runs this shard's part of a pass.

        PassTooLargeError when memory does not suffice: all requests are forgotten then, and neighbours wait for what
        does not come until this shard leaves their world. Raises anything else only when the shard itself is no longer
        to be trusted.
        """
        try:
            return self._run(plan)
        except (RuntimeError, MemoryError, CapacityError) as error:
            told = told_out_of_memory(error)
            if told is None:
                raise
        # Behind the handler: until then the error holds the frames, and these what filled the memory.
        self._forget_all()
        rows = max(plan.layer_rows, default=0)
        told_pass = f"in a pass of {rows:,} rows and" if plan.of is None else "on the way back of"
        raise PassTooLargeError(f"{told}, {told_pass} {len(plan.members)} requests")

    def _run(self, plan: Plan) -> ShardResult:
        watch = Stopwatch()
        sent_before, gathered_before = self.links.bytes.sent, self.links.bytes.gathered
        # 1) forget requests that ended early, take the members of this pass
        for request in plan.ended:
            self._forget(request)
        if plan.is_of_nobody and self.store.given_bytes >= heap.WORTH_BYTES:
            heap.trim()
            self.store.given_bytes = 0
        streams = Streams(plan, self._row_multiple, self.device, is_fixed=self.probe.has_fixed_rows)
        states = self._enter(plan, streams)
        works = [member.program.waves[member.wave].stages[self.links.stage] for member in plan.members]
        # 2) values that other stages hold from earlier waves
        self._crossings.exchange(states, [work.held for work in works], watch)
        # 3) values of this pass from earlier stages, with what has failed there
        hidden_in = self._crossings.receive(plan, streams, states, works)
        watch.lap(Phase.WAITING)
        # 4) the prologue, then the window with every fragment at its visit
        for state, work in zip(states, works, strict=True):
            for fragment in work.fragments:
                if fragment.order == PROLOGUE:
                    self.row_tables.steady.run(state, fragment)
        if plan.of is None:
            hidden_out = self._visiting.forwards(plan, streams, states, works, hidden_in)
        else:
            hidden_out = self._visiting.backwards(plan.of, states, works, hidden_in)
        watch.lap(Phase.COMPUTING)
        # 5) hidden rows and carried values go on
        hidden_bytes = self._crossings.send(plan, states, works, hidden_out)
        watch.lap(Phase.SENDING)
        # 6) saves are written, or it is known why not
        self._writer.wait()
        watch.lap(Phase.SAVING)
        for state in states:
            for node, message in state.sink.failures:
                state.fail(node, message)
        # 7) drop what no later wave needs
        result = self._result(plan, states)
        self._tapes.free(plan)
        for member, state, work in zip(plan.members, states, works, strict=True):
            for node in work.drops:
                state.values.pop(node, None)
            if member.wave == len(member.program.waves) - 1 and not member.is_last_wave:
                state.end_program(member)
            if member.is_last_wave:
                self._forget(member.program.request)
        return ShardResult(
            pass_id=plan.pass_id,
            stage=self.links.stage,
            rank=self.links.rank,
            failures=tuple(state.failure for state in states if state.failure is not None),
            fired={state.program.request: tuple(state.fired) for state in states},
            saved_bytes={state.program.request: state.sink.saved_bytes for state in states},
            carried_bytes=self.links.bytes.sent - sent_before - hidden_bytes,
            gathered_bytes=self.links.bytes.gathered - gathered_before,
            gathered={state.program.request: state.gathered_bytes for state in states},
            loaded={one.program.request: one.brought.loaded_bytes for one in states if one.brought.loaded_bytes},
            seconds=watch.seconds,
            busy_seconds=watch.seconds - watch.seconds_of(Phase.WAITING),
            began=watch.began,
            phases=tuple(watch.phases),
            drawn=drawn_of(states),
            stopped={state.program.request: state.stopped() for state in states if state.stops},
            shapes={(state.program.request, name): shape for state in states for name, shape in state.shapes.items()},
            values=result,
        )

    def _forget(self, request: RequestId) -> None:
        self._states.pop(request, None)
        self._tapes.forget(request)
        self.row_tables.forget(request)
        self.store.forget(request)

    def _forget_all(self) -> None:
        self._writer.wait()  # before their files may be laid out anew
        self._states.clear()
        self._tapes.clear()
        if hasattr(self, "row_tables"):
            self.row_tables.clear()
        self._constants.clear()
        if hasattr(self, "store"):
            self.store.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of pieces that are too small for what was asked for

    def leave(self) -> None:
        """Leaves the world of its neighbours, whatever is under way; weights stay, requests are forgotten."""
        self.links.close()
        self._forget_all()

    def stop(self) -> None:
        """Leaves the deployment, once everything sent has gone."""
        self.links.flush()
        self._writer.close()
        self._states.clear()
        self._tapes.clear()
        self.links.close()

    def _enter(self, plan: Plan, streams: Streams) -> list[RequestState]:
        rows: dict[int, dict[int, InvokeRows]] = defaultdict(dict)
        for view in plan.views:
            rows[view.member][view.invoke] = InvokeRows(view, streams)
        states = []
        for place, member in enumerate(plan.members):
            request = member.program.request
            state = self._states.get(request)
            if state is None:
                state = RequestState(member.program, self.context, sink_for(member.program, self._writer))
                self._states[request] = state
            if plan.of is not None:
                rows[place] = self._tapes.of(plan.of).rows[request]
            state.begin_wave(member, rows[place])
            states.append(state)
        return states

    def _result(self, plan: Plan, states: list[RequestState]) -> dict[tuple[RequestId, str], Tensor]:
        values: dict[tuple[RequestId, str], Tensor] = {}
        for member, state in zip(plan.members, states, strict=True):
            if isinstance(state.sink, MemorySink):
                values.update({(member.program.request, name): value for name, value in state.sink.values.items()})
                state.sink.values = {}
        return values
