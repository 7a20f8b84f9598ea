"""What the controller needs of the place where requests are kept, and what crosses between them. No Ray.

The store itself is `api.store.Store`. A claimed request belongs to the controller until it is finished or given back;
whatever the controller has in memory can be made again from the store.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeAlias

from cluster.config import Heat, Wanted
from polytrace.certificate import Generated
from polytrace.errors import PolytraceError, WireError
from polytrace.graph import Request
from polytrace.wire import decode_request, decode_tensors
from scheduling.plan import RequestId, SaveSlot
from scheduling.scheduler import Progress


class DeploymentState(Enum):
    """How far a deployment or one of its replicas is."""

    STARTING = "starting"
    WAITING = "waiting"  # for room in the cluster; the progress text says for how much, and what is free
    READY = "ready"  # every shard is loaded and self-tested
    RECOVERING = "recovering"  # shards were lost; requests are taken meanwhile, and wait
    DRAINING = "draining"  # it takes nothing new, and finishes what it has
    DRAINED = "drained"  # the same, and has nothing left; its shards stay. One that cannot run says why instead
    FAILED = "failed"  # it will not come up by itself; the progress text says why
    STOPPED = "stopped"
    WARM = "warm"  # not loaded, its weights are in the memory of nodes; the progress text says why
    COLD = "cold"  # not loaded

    @property
    def is_serving(self) -> bool:
        """Whether requests that are taken now will be run without anybody's help."""
        return self in (DeploymentState.READY, DeploymentState.RECOVERING)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """One replica of a deployment, as people see it."""

    number: int
    state: DeploymentState
    progress: str
    requests: int  # given to it and not ended
    work: int  # of these: rows x layers that they run through


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What a ready deployment tells the gateway."""

    source: str  # folder, hub id or URL of the weights, which the gateway's workers build the shape model from
    dtype: str  # as asked for, "auto" included
    description: bytes  # ModelDescription as JSON
    tokenizer: bytes | None  # tokenizer.json


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A request that the controller took."""

    request: RequestId
    path: Path  # the request as it was received
    facts: bytes  # JSON: per node its ValueFacts or null, worked out when the request was checked
    accepted: float  # when it was stored, seconds since the epoch
    work: int  # rows x layers that it runs through, at least 1
    contents: Path  # folder of its owner's contents
    states: Mapping[str, str]  # what its states are now: the hashes of their contents
    tenant: str  # whose it is: what it runs is shared and counted by tenant
    is_interactive: bool  # somebody waits for it
    is_suspect: bool  # a controller broke down while it had this request: to be run alone, in case it was the cause


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultPlace:
    """A result that is to be filled: a file that is there at its full size, or a place of objects."""

    path: Path
    start: int  # bytes before the data section, kept free for the header
    url: str | None = None  # of the place of objects, which then is it

    @property
    def target(self) -> str:
        """What shards are told."""
        return self.url or str(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftBehind:
    """A value that a request leaves on the service, or a state's new content."""

    name: str
    is_state: bool
    ttl_s: float | None
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A content's file that is there at its full size, with its header and without its data."""

    left: LeftBehind
    path: Path
    start: int  # bytes before the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a request ended."""

    request: RequestId
    header: bytes | None = None  # of its result file, exactly as long as the room kept free; None when it failed
    size: int | None = None  # of the file, where it may be shorter than it was made
    error: PolytraceError | None = None  # CancelledError when its owner cancelled it
    left: tuple[Place, ...] = ()  # what stays on the service when there is no error
    generated: tuple[Generated, ...] = ()  # how its sequences went on
    saves: tuple[SaveSlot, ...] = ()  # of a generation: those that came
    passes: int | None = None  # that it took; None: as many as were told while it ran
    # what it did cost, as measured; of one that failed, until then
    tokens: int | None = None  # of its sequences; None: as certified
    token_layers: int = 0
    moved_bytes: int = 0
    run_seconds: float = 0.0
    token_layers_alone: int = 0  # what one that is done would have taken by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFigures:
    """A pass that ran, as the service counts it."""

    requests: tuple[RequestId, ...]  # that shared it
    rows: int  # at the first layer
    seconds: float  # from the first shard's start to the last shard's end
    busy_seconds: tuple[float, ...]  # of each stage: not waiting for another one

    @property
    def users(self) -> int:
        """How many requests shared it."""
        return len(self.requests)


class RequestStore(Protocol):
    """What the loop of a replica needs of the store. Every method may be called from any thread."""

    def claim(self, model: str, limit: int) -> list[Claimed]:
        """Takes the oldest waiting requests, at most `limit`; a suspect is never taken together with another one."""

    def cancellations(self, model: str) -> list[RequestId]:
        """Claimed requests whose owners asked to cancel them."""

    def place_result(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        """Makes the result file. Raises CapacityError when the disk has no room."""

    def place_left(self, request: RequestId, left: Sequence[LeftBehind]) -> list[Place]:
        """Makes the files for what a request leaves. Raises CapacityError or TooLargeError: the disk, or the quota."""

    def finish(self, finished: Sequence[Finished]) -> None:
        """Commits the results and flips the states: first the files, then one transaction."""

    def note_progress(self, progress: Sequence[Progress]) -> None:
        """How far running requests are."""

    def note_pass(self, model: str, told: PassFigures) -> None:
        """A pass ran. Touches no file and no database, and never waits."""

    def note_planning(self, request: RequestId, seconds: float) -> None:
        """A claimed request has just become a program, which took so long. As `note_pass`."""

    def wait_for_requests(self, timeout_s: float) -> None:
        """Blocks until something may have changed for the caller, or the time is over. One thread only."""

    def interrupt(self) -> None:
        """Ends `wait_for_requests` early."""


Divide: TypeAlias = Callable[[Sequence[str], int], Mapping[str, int]]
"""Of tenants that have waiting requests, and the room: how many each may have, whoever goes first in front."""


class ControllerStore(RequestStore, Protocol):
    """What the controller needs beside that: the deployments, and requests that change hands."""

    def claim(self, model: str, limit: int, divide: Divide = ...) -> list[Claimed]:
        """Takes waiting requests of the tenants that `divide` names, each tenant's in its order, at most `limit`; a
        suspect is never taken together with another one.
        """

    def weights(self) -> Mapping[str, float]:
        """Of the tenants whose share is not 1."""

    def counters(self, model: str) -> dict[str, float]:
        """What `save_counters` has kept of a deployment."""

    def save_counters(self, model: str, changed: Mapping[str, float], gone: Collection[str]) -> None:
        """Keeps what tenants were served of a deployment (`cluster.kept_shares`)."""

    def wanted(self) -> list[Wanted]:
        """The deployments that are to be there."""

    def set_state(self, model: str, state: DeploymentState, progress: str) -> None:
        """Tells the gateway and whoever watches the start."""

    def set_replicas(self, model: str, replicas: Sequence[ReplicaStatus]) -> None:
        """Tells whoever asks how the replicas of a deployment do."""

    def publish(self, model: str, published: Published) -> None:
        """Puts down what a ready deployment serves; `set_state(READY)` follows."""

    def published(self, model: str) -> Published | None:
        """What it serves, or served last."""

    def forget(self, model: str) -> None:
        """A deployment that was to be removed is gone; a name that is wanted again meanwhile stays."""

    def now(self) -> float:
        """Seconds since the epoch, by the store's clock."""

    def cool(self, model: str, heat: Heat, why: str, cause: str) -> bool:
        """A deployment is to be no hotter than this, unless it has requests that have not ended; whether it is so."""

    def heat_up(self, model: str) -> None:
        """A deployment is to be hot."""

    def note_used(self, model: str, at: float) -> None:
        """When a deployment had its last request."""

    def num_open(self, model: str) -> int:
        """Requests of a deployment that have not ended."""

    def refuse(self, model: str, error: PolytraceError) -> None:
        """Fails every request of a deployment that has not ended."""

    def give_back(self, requests: Iterable[RequestId], suspects: Iterable[RequestId]) -> None:
        """Claimed requests wait again, and the suspects among them to be run alone."""

    def requeue(self, model: str, *, is_clean: bool) -> int:
        """Gives back every request that is claimed; how many.

        `is_clean`: nothing broke. Else each becomes a suspect, and one that saw several breakdowns fails.
        """


def left_by(slot: SaveSlot) -> LeftBehind:
    """What a save that stays on the service leaves."""
    keep = slot.keep
    assert keep is not None
    return LeftBehind(
        name=keep.name,
        is_state=keep.is_state,
        ttl_s=keep.ttl_s,
        dtype=slot.facts.dtype,
        shape=slot.facts.shape,
    )


def is_whole(path: Path) -> bool:
    """Whether a stored request has all of its bytes. Reads its header only."""
    try:
        with path.open("rb") as file:
            decode_tensors(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), "request")
    except (OSError, ValueError, WireError):  # a ValueError: an empty file
        return False
    return True


def read_request(path: Path, *, max_nodes: int) -> Request:
    """A stored request. Its constants stay in the file: they are views of a mapping that lives as long as they do."""
    if path.stat().st_size == 0:
        raise WireError("the request is empty")
    with path.open("rb") as file:
        return decode_request(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), max_nodes=max_nodes)
