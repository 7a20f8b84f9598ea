"""A pass that fails in this process is its members' failure, whatever was raised: who drives may be somebody else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from families import model_of

from engine.direct import LocalShards
from engine.local import LocalBackend
from engine.shard import Shard
from polytrace.errors import ServiceError
from polytrace.model import Model
from scheduling.plan import Plan, ShardResult


class FaultyShard:
    """Fails its first pass in a way that nobody foresaw."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._has_failed = False

    def run(self, plan: Plan) -> ShardResult:
        if plan.members and not self._has_failed:
            self._has_failed = True
            raise KeyError("a slab")
        return self._shard.run(plan)


def test_a_fault_in_a_pass_ends_its_members_and_the_next_ones_run(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path)
    backend = LocalBackend(str(tmp_path), threads=1)
    model: Any = Model(backend)

    def generate(first: int) -> list[int] | ServiceError:
        try:
            with model.generate([first, 5, 6], max_new_tokens=4, eos=()) as tracer:
                pass
        except ServiceError as error:
            return error
        return list(tracer.result.ids)

    alone = [generate(first) for first in range(4, 8)]
    backend.shards = LocalShards(cast(Shard, FaultyShard(backend.shard)))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(generate, range(4, 8)))
    failed = [one for one in found if isinstance(one, ServiceError)]
    assert failed and all("KeyError" in one.message and isinstance(one.__cause__, KeyError) for one in failed)
    assert [generate(first) for first in range(4, 8)] == alone, "nothing is left of it"
    backend.close()
