"""The controller: the only Ray driver. Serves the deployments that the store wants, and can be rebuilt from it.

Each deployment is a `ReplicaSet` that works towards what is wanted of it, whatever the others do: one that fails, or
waits for room, holds nobody up. The controller's own thread only looks, gives out requests and tells; it never waits
for shards. When Ray itself is lost it ends, its supervisor starts another one, and the requests it had claimed run
again.
"""

from __future__ import annotations

import logging
import socket
import time
import traceback
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError

from cluster import discovery
from cluster.config import ALWAYS, ControllerConfig, address_file, jobs_file
from cluster.demand import Demand
from cluster.replicas import ReplicaSet
from cluster.requests import ControllerStore, DeploymentState
from polytrace.errors import PolytraceError, UserError

_log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 128 << 20  # plans only: tensors never go through it
_REACH_S = 10.0  # for the head of a cluster to answer at all
_LOOK_S = 1.0  # looks again without a ring
_ENDING_S = 8.0  # for the replicas to end by themselves


class Controller:
    """All deployments of a service. `start` acquires, `run_forever` serves, `stop` may come from any thread."""

    def __init__(self, store: ControllerStore, config: ControllerConfig) -> None:
        self._store = store
        self._config = config
        self._sets: dict[str, ReplicaSet] = {}
        self._demand = Demand(store, _free)
        self._has_begun = self._is_stopped = False

    def start(self) -> None:
        """Joins Ray. Tells the store how far it is, and why when it fails."""
        try:
            # 1) what an earlier controller had claimed waits again
            for wanted in self._store.wanted():
                count = self._store.requeue(wanted.spec.name, is_clean=False)
                if count:
                    _log.warning("%d requests of an earlier controller are queued again", count)
            # 2) Ray
            self._say(DeploymentState.STARTING, "joining Ray" if self._config.address else "starting Ray")
            _connect(self._config)
            url = self._config.url
            self._address = discovery.publish(_reachable(url)) if url else None
        except PolytraceError as error:
            self._say(DeploymentState.FAILED, str(error))
            raise
        except Exception as error:
            self._say(DeploymentState.FAILED, "".join(traceback.format_exception(error)[-3:]).strip())
            raise

    def run_forever(self) -> None:
        """Until `stop`."""
        self._has_begun = True
        try:
            self._store.wait_for_requests(0.0)  # listens from now on: what came before is seen by the first look
            while not self._is_stopped:
                self._pursue()
                self._store.wait_for_requests(_LOOK_S)
        finally:
            self._say(DeploymentState.STOPPED, "stopping")
            self._end_all()
            ray.shutdown()

    def stop(self) -> bool:
        """Ends `run_forever` soon; False when it has not begun, and there is nothing to end but the process."""
        self._is_stopped = True
        self._store.interrupt()
        return self._has_begun

    def _pursue(self) -> None:
        for replicas in self._sets.values():
            replicas.give_out()
        for wanted in self._store.wanted():
            name = wanted.spec.name
            if name not in self._sets:
                self._sets[name] = ReplicaSet(self._store, self._config, wanted)
            if not self._sets[name].pursue(wanted):
                del self._sets[name]
        if self._demand.is_due():
            self._see_demand()

    def _see_demand(self) -> None:
        now = self._store.now()
        standings = [replicas.standing(now) for replicas in self._sets.values()]
        if all(one.wanted.keeping == ALWAYS for one in standings):
            return  # all stay loaded
        notes = self._demand.look(standings)
        for name, replicas in self._sets.items():
            replicas.note = notes.get(name, "")

    def _end_all(self) -> None:
        deadline = time.monotonic() + _ENDING_S
        for replicas in self._sets.values():
            replicas.stop()
        for name, replicas in self._sets.items():
            replicas.join(max(0.0, deadline - time.monotonic()))
            self._store.requeue(name, is_clean=True)

    def _say(self, state: DeploymentState, progress: str) -> None:
        for wanted in self._store.wanted():
            self._store.set_state(wanted.spec.name, state, progress)


def _connect(config: ControllerConfig) -> None:
    """Joins a cluster, or starts one that ends with this process."""
    if config.address is not None:
        _join(config.address)
        return
    context: Any = ray.init(  # a RayContext, but typed as its base
        address="local",  # whatever RAY_ADDRESS says: joining is asked for by name
        namespace=discovery.NAMESPACE,
        include_dashboard=config.takes_jobs,
        log_to_driver=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=config.ray_folder,
    )
    if config.ray_folder is not None:
        if config.takes_jobs:
            jobs_file(config.ray_folder).write_text(f"http://{context.address_info['webui_url']}")
        address_file(config.ray_folder).write_text(ray.get_runtime_context().gcs_address)


def _free() -> dict[str, float]:
    """What nobody has reserved of the cluster."""
    return dict(ray.available_resources())  # type: ignore[no-untyped-call]


def _join(address: str) -> None:
    if address != "auto":  # Ray itself would try for minutes
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        ray.init(address=address, namespace=discovery.NAMESPACE, log_to_driver=False)
    except AuthenticationError as error:
        raise UserError(f"the Ray cluster at {address} asks for its token: {discovery.TOKEN_HINT}") from error
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"{error} If its token is another one, {discovery.TOKEN_HINT}") from error


def _reachable(url: str) -> str:
    """The gateway's URL for other nodes of the cluster, when it listens on every address."""
    parts = urlsplit(url)
    if parts.hostname not in ("0.0.0.0", "::"):
        return url
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return f"{parts.scheme}://{address}:{parts.port}"
