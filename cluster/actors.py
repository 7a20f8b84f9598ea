"""The process edge of a shard: what `cluster.deployment` calls from afar. Made remote where it is launched.

A thin class over `engine.shard.Shard`: it meets the other shards, turns progress into a stream of lines, and does one
call after the other in the order they were made; only `beat` is answered at once, whatever else is under way. Tensors
between shards never come through here.
"""

from __future__ import annotations

import fcntl
import os
import queue
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ray

from polytrace.collector import settle, uncollected

with uncollected():
    from cluster.shipping import Incoming, Shipment
    from engine.fetching import here
    from engine.links import Distributed, join_store, open_store
    from engine.loading import ShardConfig
    from engine.reading import Reading
    from engine.reports import GateReport
    from engine.whole_served import new_shard
    from polytrace.description import ModelDescription
    from polytrace.errors import ServiceError
    from scheduling.plan import ShardResult

WATCH = "watch"  # the concurrency group of `beat`


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPoint:
    """Where the shards of one deployment find each other."""

    host: str
    port: int


class ShardActor:
    """One shard in a process of its own. Construction is cheap; call `meet`, `load`, `gate`, `open`, then `run`."""

    def __init__(self, config: ShardConfig, backend: str) -> None:
        self._config = config
        self._backend = backend
        self._links: Distributed | None = None
        self._is_loaded = False
        self._has_left = False  # its world, for a failure
        self._incoming = Incoming()

    @ray.method(concurrency_group=WATCH)
    def beat(self) -> None:
        """Answers at once: the process is there and runs."""

    def host_meeting(self) -> MeetingPoint:
        """Opens the meeting point on this node; one shard of the deployment does."""
        host = _own_address()
        self._meeting = open_store(host)  # lives as long as this process
        return MeetingPoint(host=host, port=self._meeting.port)

    def meet(self, point: MeetingPoint) -> int:
        """Connects to the other shards (collective), also anew after a loss. The process id."""
        interface = _interface_of(_own_address())
        if interface is not None:  # gloo would look the host's name up, which many machines resolve to loopback
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        config = self._config = replace(self._config, source=here(self._config.source))
        store = join_store(point.host, point.port)
        if self._links is not None:
            self._links.meet(store)
        else:
            self._links = Distributed(
                store,
                stage=config.stage,
                stages=config.stages,
                rank=config.rank,
                ranks=config.ranks,
                device=config.device,
                backend=self._backend,
            )
            self._shard = new_shard(config, self._links)
        self._has_left = False
        return os.getpid()

    def leave(self) -> None:
        """Leaves the world that it is in, if it is in one; weights stay."""
        if self._links is not None and not self._has_left:
            self._shard.leave()
        self._incoming.forget_all()  # as the shard has
        self._has_left = True

    def load(self) -> Iterator[str | Reading]:
        """Reads this shard's weights, unless it has; yields lines of progress, and how far it is, as they come."""
        if self._is_loaded:
            return
        lines: queue.SimpleQueue[str | Reading | None] = queue.SimpleQueue()
        failure: list[Exception] = []

        def start() -> None:
            try:
                self._shard.start(lines.put)
            except Exception as error:  # noqa: BLE001  the edge of the thread: raised below
                failure.append(error)
            finally:
                lines.put(None)

        thread = threading.Thread(target=start, name="load")
        thread.start()
        while (line := lines.get()) is not None:
            yield line
        thread.join()
        if failure:
            raise failure[0]
        self._is_loaded = True

    def files(self) -> tuple[str, list[str]]:
        """The node, and the files there that this shard read its weights from."""
        return ray.get_runtime_context().get_node_id(), list(self._shard.files)

    def gate(self, is_first: bool) -> GateReport:
        """Proves on the served weights that rows are their own, the first time also how ranks split it (collective)."""
        return self._shard.gate(is_first)

    def describe(self, name: str, reports: list[GateReport]) -> ModelDescription:
        """The deployment's description from every shard's report."""
        return self._shard.describe(name, reports)

    def open(self, description: ModelDescription) -> None:
        """Takes the description; plans can run from now on."""
        self._shard.open(description)
        settle()

    def run(self, shipment: Shipment) -> ShardResult:
        """This shard's part of a pass.

        When it fails, neighbours that wait for it are told by its leaving.
        """
        if self._has_left:
            raise ServiceError("it left after a failure")
        try:
            return self._shard.run(self._incoming.unpack(shipment))
        except BaseException:
            self.leave()
            raise

    def ping(self) -> int:
        """Answers when the shard has done everything before: the process id."""
        return os.getpid()

    def stop(self) -> None:
        """Leaves the deployment."""
        if hasattr(self, "_shard"):
            self._shard.stop()


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address, None when none has (or the machine is no Linux)."""
    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
