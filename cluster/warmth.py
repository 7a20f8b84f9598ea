"""The weights of a deployment that rests, kept in memory on the nodes where its shards read them.

Each node has a process that holds the files (`cluster.holder`) until the deployment is loaded again, or is to be cold.
Where it ran is known from its shards; after a restart of the controller it is this node that holds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.holder import Held, Holder
from engine.checkpoint import weight_paths
from engine.fetching import here
from polytrace.errors import CapacityError, PolytraceError

BEAT_S = 5.0  # between two looks at whether they are still there


class WeightsHolder(Holder):
    """Finds out itself which files they are where nobody knows: a source may be a URL, which may take its time."""

    def hold_weights(self, source: str, paths: Sequence[str]) -> Held:
        """Holds these files, or, when there are none, those of the model's weights on this node."""
        found = paths or sorted(weight_paths(here(source)))
        if not found:
            raise CapacityError("no file of its weights is here")
        return self.hold(found)


class Warmth:
    """For the controller's thread; nothing waits for the nodes."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._holders: list[Any] = []
        self._asked: list[Any] = []  # their answers, on their way
        self._beats: list[Any] = []
        self._looked = 0.0
        self._num_bytes, self._is_locked = 0, True
        self._failure = ""
        self._files: Mapping[str, frozenset[str]] = {}

    def hold(self, source: str, files: Sequence[Mapping[str, frozenset[str]]]) -> None:
        """Begins to hold the files of weights that shards read, by node; of a model that was not loaded yet, those that
        are on this node. Does nothing when it has begun.
        """
        if self._holders or self._failure:
            return
        found: dict[str, frozenset[str]] = {}
        for one in files:
            for node, paths in one.items():
                found[node] = found.get(node, frozenset()) | paths
        self._files = found or self._files
        for node in self._files or [ray.get_runtime_context().get_node_id()]:
            remote = ray.remote(WeightsHolder).options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            )
            self._holders.append(remote.remote())
            self._asked.append(self._holders[-1].hold_weights.remote(source, sorted(self._files.get(node, ()))))
        self._num_bytes, self._is_locked = 0, True

    def told(self) -> tuple[bool, str]:
        """Whether all of it is held, and what there is to say."""
        for held in self._answers(self._asked):
            self._num_bytes += held.num_bytes
            self._is_locked &= held.is_locked
        if self._holders and not self._asked and time.monotonic() - self._looked > BEAT_S:
            self._looked = time.monotonic()
            list(self._answers(self._beats))
            if not self._beats:
                self._beats = [holder.beat.remote() for holder in self._holders]
        if self._failure:
            return False, f"not warm: {self._failure}"
        if self._asked or not self._holders:
            return False, "its weights are being read into memory"
        return True, str(Held(num_bytes=self._num_bytes, is_locked=self._is_locked))

    def release(self) -> None:
        """Lets go of all of it."""
        self._end()
        self._failure = ""

    def _answers(self, asked: list[Any]) -> Iterator[Any]:
        """Those that have come; they are no longer asked for. A holder that failed or ended is the end of all."""
        if not asked:
            return
        ready, asked[:] = ray.wait(asked, num_returns=len(asked), timeout=0)
        for answer in ready:
            try:
                yield ray.get(answer)
            except RayTaskError as error:
                self._fail(str(error.cause) if isinstance(error.cause, PolytraceError) else str(error))
            except RayError as error:
                self._fail(f"what held its weights ended: {error}")

    def _fail(self, why: str) -> None:
        self._end()
        self._failure = why

    def _end(self) -> None:
        for holder in self._holders:
            if ray.is_initialized():
                ray.kill(holder)
        self._holders, self._asked, self._beats = [], [], []
