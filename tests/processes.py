"""Shards as plain processes over pipes and gloo: what Ray actors are to a cluster, without Ray."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from cluster.shipping import Incoming, Outgoing
from engine.direct import DirectBackend
from engine.links import Distributed, join_store, open_store
from engine.loading import ShardConfig, meta_model
from engine.shard import Shard
from polytrace.errors import PolytraceError, ServiceError
from polytrace.graph import Graph, Op, Request
from polytrace.wire import encode_request
from scheduling.plan import Plan, Program, ShardResult
from scheduling.policy import PassPolicy, passes_in_flight


def in_processes(function: Callable[..., None], arguments: tuple[Any, ...], number: int) -> None:
    """Runs `function(place, *arguments)` in so many processes; torch is imported once, not by each."""
    mp.get_context("forkserver").set_forkserver_preload(["engine.shard"])
    mp.start_processes(function, arguments, nprocs=number, start_method="forkserver")


def _serve(pipe: Connection, kind: type[Shard], config: ShardConfig, port: int) -> None:
    try:
        store = join_store("127.0.0.1", port, timeout_s=60)
        place = {name: getattr(config, name) for name in ("stage", "stages", "rank", "ranks")}
        shard = kind(config, Distributed(store, **place, timeout_s=60))
        shard.start(lambda line: None)
        pipe.send(shard.gate())
        name, reports = pipe.recv()
        description = shard.describe(name, reports)
        shard.open(description)
        pipe.send(description)
        incoming = Incoming()
        while (shipment := pipe.recv()) is not None:
            pipe.send(shard.run(incoming.unpack(shipment)))
        shard.stop()
    except Exception:
        pipe.send(traceback.format_exc())
        raise


class ProcessShards:
    """The loop's view of a deployment of processes: as many passes in flight as keep the stages at work."""

    def __init__(
        self,
        source: str,
        *,
        stages: int,
        ranks: int,
        dtype: str = "auto",
        kinds: dict[tuple[int, int], type[Shard]] | None = None,
    ) -> None:
        context = mp.get_context("forkserver")  # torch and transformers are imported once, not by every shard
        context.set_forkserver_preload(["engine.shard"])
        self._store = open_store("127.0.0.1", timeout_s=60)
        self.stages = stages
        self._pipes: list[Connection] = []
        self._processes = []
        config = ShardConfig(source=source, dtype=dtype, stages=stages, ranks=ranks, threads=1)
        for stage in range(stages):
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                own = dataclasses.replace(config, stage=stage, rank=rank)
                kind = (kinds or {}).get((stage, rank), Shard)
                process = context.Process(target=_serve, args=(theirs, kind, own, self._store.port), daemon=True)
                process.start()
                self._pipes.append(ours)
                self._processes.append(process)
        reports = self._collect()
        for pipe in self._pipes:
            pipe.send(("tiny", reports))
        descriptions = self._collect()
        assert all(description == descriptions[0] for description in descriptions)
        self.description = descriptions[0]
        self._in_flight: list[Plan] = []
        self._outgoing = Outgoing()

    def have_room(self) -> bool:
        return len(self._in_flight) < passes_in_flight(self.stages)

    def submit(self, plan: Plan) -> None:
        self._in_flight.append(plan)
        shipment = self._outgoing.pack(plan)
        for pipe in self._pipes:
            pipe.send(shipment)

    def finished(self) -> Iterator[tuple[Plan, tuple[ShardResult, ...] | PolytraceError]]:
        if self._in_flight:
            yield self._in_flight.pop(0), tuple(self._collect())

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(60)
            assert process.exitcode == 0

    def _collect(self) -> list[Any]:
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(120):
                raise ServiceError("a shard process did not answer in two minutes")
            answers.append(pipe.recv())
        for answer in answers:
            if isinstance(answer, str):
                raise ServiceError(f"a shard process failed:\n{answer}")
        return answers


class ProcessBackend(DirectBackend):
    """A backend over process shards: constants reach them as on a cluster, through the stored request file."""

    def __init__(self, source: str, shards: ProcessShards, folder: Path, policy: PassPolicy | None = None) -> None:
        super().__init__(source, shards, shards.description, meta_model(source), policy)
        self._folder = folder

    def work_out(self, request: Request) -> Program:
        program = super().work_out(request)
        file = self._folder / f"{program.request}.safetensors"
        file.write_bytes(b"".join(encode_request(request)))
        return _with_file(program, str(file))


def _with_file(program: Program, file: str) -> Program:
    """The program, and those of its steps, without constants of their own."""
    chain = program.chain
    if chain is not None:
        chain = dataclasses.replace(chain, parts=tuple(_with_file(part, file) for part in chain.parts))
    return dataclasses.replace(program, constants={}, request_file=file, chain=chain)


BROKEN_SEED = 666


class FaultyShard(Shard):
    """A shard on which every arithmetic op of requests with `BROKEN_SEED` fails, and of no other."""

    def run(self, plan: Plan) -> ShardResult:
        members = tuple(
            dataclasses.replace(member, program=_broken(member.program))
            if member.program.seed == BROKEN_SEED
            else member
            for member in plan.members
        )
        return super().run(dataclasses.replace(plan, members=members))


def _broken(program: Program) -> Program:
    nodes = tuple(
        dataclasses.replace(node, args=(*node.args, "not a number"))
        if isinstance(node, Op) and node.name == "mul"
        else node
        for node in program.graph.nodes
    )
    return dataclasses.replace(program, graph=Graph(nodes=nodes))
