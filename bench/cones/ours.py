"""The workloads in polytrace, written as its users write them: a loop of invokes in one trace, or a request a user."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cones.hooks import Values, wanted_sources
from bench.cones.workloads import Edit, Point, Read, Run, Workload
from bench.merged import run_together
from engine.local import LocalBackend
from polytrace.certificate import Receipt
from polytrace.graph import Request
from polytrace.model import Model
from scheduling.plan import Plan, Program
from scheduling.scheduler import Outcome

# What one request may be is a service's decision; a benchmark of sweeps lifts it.
_NO_LIMIT = 1 << 40


class Ours:
    """A model in this process, with a stopwatch between recording, working out, planning and running."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        self.backend = _Timed(str(folder), dtype="float32", threads=threads, device="cpu")
        description = self.backend.description
        limits = dataclasses.replace(
            description.limits,
            max_request_tokens=_NO_LIMIT,
            max_nodes=_NO_LIMIT,
            max_live_bytes=_NO_LIMIT,
            max_value_bytes=_NO_LIMIT,
        )
        self.backend.description = dataclasses.replace(description, limits=limits)
        self._model: Any = Model(self.backend)
        self.receipts: tuple[Receipt, ...] = ()  # of the last run
        self.num_nodes = 0  # of the last run's graphs

    @property
    def stages_s(self) -> Mapping[str, float]:
        """Seconds of the last run: record, compile, plan, and run (the rest: the passes and handing back)."""
        return dict(self.backend.seconds)

    def run(self, workload: Workload, *, sharing: str = "tenant") -> Values:
        """What the runs give back."""
        start = time.perf_counter()
        self.backend.seconds = dict.fromkeys(("record", "compile", "plan", "run"), 0.0)
        values = self._separately(workload, sharing) if workload.is_separate else self._jointly(workload, sharing)
        rest = sum(self.backend.seconds.values())
        self.backend.seconds["record"] = time.perf_counter() - start - rest
        return values

    def close(self) -> None:
        self.backend.close()

    def _jointly(self, workload: Workload, sharing: str) -> Values:
        with self._model.trace(sharing=sharing) as tracer:
            saved = self._record(workload, tracer)
        self.receipts = (tracer.receipt,)
        self.num_nodes = len(tracer.request.graph.nodes)
        return {member: _flat(value) for member, value in saved.items()}

    def _separately(self, workload: Workload, sharing: str) -> Values:
        """A request of its own for each run, all waiting when the first pass is planned."""
        programs = []
        self.num_nodes = 0
        for run in workload.runs:
            with self._model.trace([run.ids], sharing=sharing, run=False) as tracer:
                self._change(run.edits, {}, len(run.ids))
                self._read(run, workload)
            assert tracer.request is not None
            self.num_nodes += len(tracer.request.graph.nodes)
            programs.append(self.backend.work_out(tracer.request))
        outcomes = run_together(self.backend, programs)
        self.receipts = tuple(outcome.receipt for outcome in outcomes if outcome.receipt is not None)
        return {
            member: _flat(torch.as_tensor(next(iter(outcome.values.values()))))
            for member, outcome in enumerate(outcomes)
        }

    def _record(self, workload: Workload, tracer: Any) -> dict[int, Any]:
        saved: dict[int, Any] = {}
        sources: dict[tuple[int, Point, int], Any] = {}
        wanted = wanted_sources(workload)
        for member, run in enumerate(workload.runs):
            with tracer.invoke([run.ids]):
                self._change(run.edits, sources, len(run.ids))
                for point, layer in wanted.get(member, ()):
                    sources[member, point, layer] = self._tensor(point, layer)
                if run.read is not Read.NOTHING:
                    saved[member] = self._read(run, workload)
        return saved

    def _change(self, edits: tuple[Edit, ...], sources: Mapping[tuple[int, Point, int], Any], length: int) -> None:
        for edit in edits:
            tensor = self._tensor(edit.point, edit.layer)
            rows: Any = slice(edit.start, edit.stop) if (edit.start, edit.stop) != (0, length) else slice(None)
            if edit.stop - edit.start == 1:
                rows = -1 if edit.stop == length else edit.start
            if edit.source is not None:
                tensor[:, rows] = sources[edit.source, edit.point, edit.layer][:, rows]
            elif edit.added is not None:
                tensor[:, rows] += edit.added if isinstance(rows, slice) else edit.added[0]
            elif edit.channels is not None:
                tensor[:, rows, slice(*edit.channels)] = 0

    def _read(self, run: Run, workload: Workload) -> Any:
        model = self._model
        if run.read is Read.HIDDEN:
            return model.model.layers[run.layer].output[0][:, -1].save()
        if run.read is Read.LENS:
            return [model.lm_head(model.model.norm(layer.output[0])).amax(-1).save() for layer in model.model.layers]
        logits = model.lm_head.output[:, -1]
        if run.read is Read.LOGITS:
            return logits.save()
        return (logits[:, workload.good] - logits[:, workload.bad]).save()

    def _tensor(self, point: Point, layer: int) -> Any:
        layers = self._model.model.layers
        if point is Point.EMBEDDING:
            return self._model.model.embed_tokens.output
        if point is Point.RESIDUAL:
            return layers[layer].output[0]
        return layers[layer].mlp.output if point is Point.MLP else layers[layer].self_attn.o_proj.input


class _Timed(LocalBackend):
    """A backend that says what its parts took."""

    seconds: dict[str, float]

    def work_out(self, request: Request) -> Program:
        with self._clock("compile"):
            return super().work_out(request)

    def run_together(self, *arguments: Any, **named: Any) -> list[Outcome]:
        """As the backend's own; the planning of its passes is timed apart."""
        plain: Callable[[], Plan] = self.scheduler.next_pass

        def next_pass() -> Plan:
            with self._clock("plan"):
                return plain()

        planned = self.seconds["plan"]
        self.scheduler.next_pass = next_pass  # type: ignore[method-assign]
        start = time.perf_counter()
        try:
            return super().run_together(*arguments, **named)
        finally:
            self.seconds["run"] += time.perf_counter() - start - (self.seconds["plan"] - planned)
            del self.scheduler.next_pass

    @contextlib.contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def _flat(value: Any) -> Tensor:
    """A saved value without the dimension of its one sequence; a lens as one tensor."""
    if isinstance(value, list):
        return torch.stack([torch.as_tensor(layer)[0] for layer in value])
    return torch.as_tensor(value)[0]
