"""What a shard really holds for the way back of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from engine.local import LocalBackend
from engine.saved import SavedTensors
from engine.shard import Shard
from engine.tape import Tape
from polytrace.errors import ServiceError
from scheduling.plan import Plan, Program, RequestId, ShardResult


def held_bytes(shard: Shard) -> int:
    """Of all tapes: what operations have saved, the leaves and their gradients; memory that several share once."""
    model = shard.loaded.model
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    for tape in shard._tapes._tapes.values():
        for tensor in (*_saved(tape.saved), *_leaves(tape)):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def held_by_pass(backend: LocalBackend, program: Program) -> list[int]:
    """`held_bytes` behind each pass of a request that runs alone."""
    scheduler, found = backend.scheduler, []
    scheduler.add(program)
    while scheduler.has_work():
        backend.shards.submit(scheduler.next_pass())
        for plan, results in backend.shards.finished():
            assert isinstance(results, tuple), results
            scheduler.complete(plan, results)
        found.append(held_bytes(backend.shard))
    (outcome,) = scheduler.take_outcomes()
    assert outcome.error is None, outcome.error
    return found


class MeasuredShard(Shard):
    """A shard that fails when it holds more than the certificates of those say whose tapes it has."""

    def run(self, plan: Plan) -> ShardResult:
        told: dict[RequestId, int] = self.__dict__.setdefault("_told", {})
        told.update((member.program.request, member.program.tape_bytes) for member in plan.members)
        result = super().run(plan)
        held = held_bytes(self)
        most = sum(told[request] for request in {request for request, _ in self._tapes._passes})
        if held > most:
            raise ServiceError(f"{held} bytes are held, and certificates say {most}")
        return result


def _saved(saved: SavedTensors) -> Iterator[Tensor]:
    for refs in saved._by_memory.values():
        yield from (kept.tensor for kept in (ref() for ref in refs) if kept is not None)


def _leaves(tape: Tape) -> Iterator[Tensor]:
    leaves: list[Any] = [*tape._leaves(), tape.hidden_out]
    for leaf in leaves:
        if leaf is not None:
            yield leaf
            if leaf.is_leaf and leaf.grad is not None:
                yield leaf.grad
