"""How one shard talks to its neighbours: the ranks of its own stage, and the same rank of other stages.

Owns every collective and every point-to-point message of the product, and counts their bytes. It knows nothing of
models, plans or requests. `Solo` is one process; `Distributed` is a torch.distributed world of stages x ranks
processes, where shard (stage, rank) has the global rank `stage * ranks + rank`.

A shard that fails leaves its world: its neighbours fail then too, one after another, and none waits for the time-out.
The links themselves outlive a world: all shards `meet` in a new one, and models go on talking through the same object.

Invariants
- `ordered_sum` is the only reduction in the product. It gathers and adds in rank order, because a ring all-reduce
  adds in an order that depends on where a row lies in the tensor.
- Tensors travel as raw bytes, so every dtype can, over gloo and NCCL alike.
- Messages between two stages arrive in the order they were sent. Each direction has its own process group: on NCCL
  two shards that send to each other through one group would wait for each other.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Store, TCPStore, Work

from polytrace.errors import ServiceError

COLLECTIVE_TIMEOUT_S = 300.0  # longer than any pass: a stage waits in `receive` while the one before it computes
BARRIER_TIMEOUT_S = 3600.0  # loading: shards of one deployment may read their files at very different speeds


@dataclass(slots=True)
class LinkBytes:
    """Running totals of one shard. A caller that wants one part's bytes takes the difference around it."""

    gathered: int = 0  # received from other ranks by `gather` and `share`
    summed: int = 0  # received from other ranks by `ordered_sum`
    sent: int = 0  # sent to other stages


class Links(Protocol):
    """One shard's place in its deployment and its connections. Every rank of a stage makes the same calls in order."""

    stage: int
    stages: int
    rank: int
    ranks: int
    bytes: LinkBytes

    def ordered_sum(self, tensor: Tensor) -> Tensor:
        """The sum of floating-point tensors over the ranks, added in rank order; the same bits on every rank."""

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The ranks' tensors, equal in shape, concatenated along `dim` in rank order."""

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        """What `rank` has, on every rank; the others give a tensor of that shape and dtype, which may be used up."""

    def send(self, tensor: Tensor, stage: int) -> None:
        """Start sending to the same rank of another stage; returns at once. The tensor must not change until
        `flush`; it is kept alive until it has gone.
        """

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        """The next tensor that the same rank of `stage` sent here. Blocks; ServiceError when that shard is gone."""

    def flush(self) -> None:
        """Wait until everything sent has gone."""

    def barrier(self, timeout_s: float = BARRIER_TIMEOUT_S) -> None:
        """Wait for every shard of the deployment, however long each takes within the time-out."""

    def close(self) -> None:
        """Leave the world, so that neighbours who wait for this shard notice; may be called twice. Nothing may be
        called afterwards.
        """


class Solo:
    """The links of a shard that is alone: one stage, one rank."""

    def __init__(self) -> None:
        self.stage, self.stages, self.rank, self.ranks = 0, 1, 0, 1
        self.bytes = LinkBytes()

    def ordered_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        return tensor

    def send(self, tensor: Tensor, stage: int) -> None:
        raise ServiceError(f"a shard that is alone cannot send to stage {stage}")

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        raise ServiceError(f"a shard that is alone cannot receive from stage {stage}")

    def flush(self) -> None:
        pass

    def barrier(self, timeout_s: float = BARRIER_TIMEOUT_S) -> None:
        pass

    def close(self) -> None:
        pass


def open_store(host: str, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> TCPStore:
    """The meeting point of a world, listening on a free port of `host`; read the port from the store's `.port`."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(host: str, port: int, *, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> TCPStore:
    """A client of the store that another shard opened."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


class Distributed:
    """The links of one shard among stages x ranks processes. Constructing it meets the others (collective).

    The backend is NCCL for GPUs and gloo else, unless one is named: gloo also serves shards that share a GPU.
    """

    def __init__(
        self,
        store: Store,
        *,
        stage: int,
        stages: int,
        rank: int,
        ranks: int,
        device: str = "cpu",
        backend: str | None = None,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        self.stage, self.stages, self.rank, self.ranks = stage, stages, rank, ranks
        self.device = _with_index(torch.device(device))
        self.bytes = LinkBytes()
        self._timeout = timedelta(seconds=timeout_s)
        self._sending: deque[tuple[Work, Tensor]] = deque()
        self._backend = backend or ("nccl" if self.device.type == "cuda" else "gloo")
        self._wire = torch.device("cpu") if self._backend == "gloo" else self.device  # where bytes lie when they travel
        self.meet(store)

    def meet(self, store: Store) -> None:
        """Meets the others in a new world (collective); the one before must be left. Whoever talks through these
        links goes on with them.
        """
        ranks, stages = self.ranks, self.stages
        self._store = store
        self._barriers = 0
        dist.init_process_group(
            self._backend,
            store=store,
            rank=self.stage * ranks + self.rank,
            world_size=stages * ranks,
            timeout=self._timeout,
            device_id=self.device if self._backend == "nccl" else None,
        )
        groups = [self._group([s * ranks + r for r in range(ranks)]) for s in range(stages)]
        self.rank_group = groups[self.stage]  # the ranks of this stage
        everyone = list(range(stages * ranks))
        self._forward, self._backward = self._group(everyone), self._group(everyone)

    def ordered_sum(self, tensor: Tensor) -> Tensor:
        if self.ranks == 1:
            return tensor
        parts = self._all_gather(tensor)
        self.bytes.summed += (self.ranks - 1) * tensor.nbytes
        # Half precision is rounded once, after the sum: closer to one matrix product than a rounding at every rank.
        total = parts[0].to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for part in parts[1:]:
            total += part
        return total.to(tensor.dtype)

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        if self.ranks == 1:
            return tensor
        self.bytes.gathered += (self.ranks - 1) * tensor.nbytes
        return torch.cat(self._all_gather(tensor), dim)

    def share(self, tensor: Tensor, rank: int) -> Tensor:
        if self.ranks == 1:
            return tensor
        raw = as_bytes(tensor).to(self._wire)
        try:
            dist.broadcast(raw, self.stage * self.ranks + rank, group=self.rank_group)
        except RuntimeError as error:
            raise ServiceError(f"stage {self.stage} rank {self.rank} lost a rank of its stage: {error}") from error
        if rank != self.rank:
            self.bytes.gathered += raw.numel()
        return raw.to(self.device).view(tensor.dtype).view(tensor.shape)

    def send(self, tensor: Tensor, stage: int) -> None:
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        raw = as_bytes(tensor).to(self._wire)
        if raw.numel() == 0:
            return
        group = self._forward if stage > self.stage else self._backward
        work = dist.isend(raw, self._peer(stage), group=group)
        assert work is not None, "a shard is a member of its own groups"
        self._sending.append((work, raw))
        self.bytes.sent += raw.numel()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self._wire)
        raw = as_bytes(tensor)
        if raw.numel() == 0:
            return tensor.to(self.device)
        group = self._backward if stage > self.stage else self._forward
        try:
            dist.recv(raw, self._peer(stage), group=group)
        except RuntimeError as error:
            raise ServiceError(f"stage {self.stage} rank {self.rank} lost stage {stage}: {error}") from error
        return tensor.to(self.device)

    def flush(self) -> None:
        while self._sending:
            work, _ = self._sending[0]
            try:
                work.wait()
            except RuntimeError as error:
                raise ServiceError(f"stage {self.stage} rank {self.rank} lost a neighbour: {error}") from error
            self._sending.popleft()

    def barrier(self, timeout_s: float = BARRIER_TIMEOUT_S) -> None:
        # Through the store and not a collective: the groups' own time-out is for passes, not for reading weights.
        self._barriers += 1
        keys = [f"polytrace/barrier/{self._barriers}/{shard}" for shard in range(self.stages * self.ranks)]
        self._store.set(keys[self.stage * self.ranks + self.rank], "1")
        try:
            self._store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise ServiceError(f"a shard did not arrive within {timeout_s:.0f} s: {error}") from error

    def close(self) -> None:
        self._sending.clear()
        _let_go(sys.exception())
        if dist.is_initialized():
            dist.destroy_process_group()
        # Connections close when the groups' last references go: gloo knows no other way to tell those who wait.
        for group in ("rank_group", "_forward", "_backward"):
            vars(self).pop(group, None)  # it may have left before
        gc.collect(1)  # cycles of a moment ago; all of them would take half a second, more under load

    def _all_gather(self, tensor: Tensor) -> tuple[Tensor, ...]:
        raw = as_bytes(tensor).to(self._wire)
        if raw.numel() == 0:
            return (tensor,) * self.ranks
        gathered = torch.empty(self.ranks * raw.numel(), dtype=torch.uint8, device=raw.device)
        try:
            dist.all_gather_single(gathered, raw, group=self.rank_group)
        except RuntimeError as error:
            raise ServiceError(f"stage {self.stage} rank {self.rank} lost a rank of its stage: {error}") from error
        return gathered.to(self.device).view(tensor.dtype).view(self.ranks, *tensor.shape).unbind(0)

    def _group(self, members: list[int]) -> ProcessGroup:
        # Every process makes every group, in the same order, as torch demands.
        group: ProcessGroup = dist.new_group(members, timeout=self._timeout)
        return group

    def _peer(self, stage: int) -> int:
        return stage * self.ranks + self.rank


def _let_go(failure: BaseException | None) -> None:
    """Clears the frames of a failure that is being handled: they hold groups, and while they do, neighbours who wait
    for this shard are not told.
    """
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__cause__ or failure.__context__


def _with_index(device: torch.device) -> torch.device:
    """The device that "cuda" means here, made current: NCCL wants it by number."""
    if device.type != "cuda":
        return device
    if device.index is not None:
        torch.cuda.set_device(device)
    return torch.device("cuda", torch.cuda.current_device())


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat uint8 tensor: a view when it is contiguous, else of a copy."""
    dense = tensor.detach().contiguous()
    # Not reshape: a single element counts as contiguous and would keep a stride that forbids viewing it as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
