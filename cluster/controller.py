"""The controller: the only Ray driver. Starts a deployment, runs its loop, and can be rebuilt from the store any time.

Lost shards it mends (`Deployment.recover`). Whatever it cannot mend it does not survive: it ends, its supervisor starts
another one, and the requests it had claimed run again.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import traceback
from dataclasses import replace
from urllib.parse import urlsplit

import ray
from ray.exceptions import AuthenticationError

from cluster import discovery
from cluster.config import ControllerConfig, address_file
from cluster.deployment import Deployment, DeploymentConfig
from cluster.dispatch import Dispatcher
from cluster.requests import DeploymentState, Published, RequestStore
from engine.loading import check_source
from engine.tokenizer import tokenizer_json
from polytrace.codec import to_json
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError, UserError
from scheduling.policy import PassPolicy, wave_tokens

_log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 128 << 20  # plans only: tensors never go through it
_REACH_S = 10.0  # for the head of a cluster to answer at all


class Controller:
    """One deployment, from start to end. `start` acquires, `run_forever` serves, `stop` may come from any thread."""

    def __init__(self, store: RequestStore, config: ControllerConfig) -> None:
        self._store = store
        self._config = config
        self._dispatcher: Dispatcher | None = None

    def start(self) -> None:
        """Ray, the shards, and then the word to the gateway. Tells the store how far it is, and why when it fails."""
        self._say(DeploymentState.STARTING, "starting")
        try:
            self._start()
        except PolytraceError as error:
            self._say(DeploymentState.FAILED, str(error))
            raise
        except Exception as error:
            self._say(DeploymentState.FAILED, "".join(traceback.format_exception(error)[-3:]).strip())
            raise

    def run_forever(self) -> None:
        """Until `stop`, or until the deployment is lost: ServiceError."""
        assert self._dispatcher is not None, "start() first"
        try:
            self._dispatcher.run_forever()
            self._store.requeue(self._config.name, is_clean=True)
        finally:
            self._say(DeploymentState.STOPPED, "stopping")
            self._deployment.stop()
            ray.shutdown()

    def stop(self) -> bool:
        """Ends `run_forever` soon; False when it has not begun, and there is nothing to end but the process."""
        if self._dispatcher is None:
            return False
        self._dispatcher.stop()
        return True

    def _start(self) -> None:
        config = self._config
        # 1) what an earlier controller had claimed waits again
        count = self._store.requeue(config.name, is_clean=False)
        if count:
            _log.warning("%d requests of an earlier controller are queued again", count)
        # 2) a model that cannot be built is known before anything is started
        self._report(f"looking at {config.source}")
        check_source(config.source, config.dtype, random_weights=config.random_weights_seed is not None)
        # 3) Ray
        self._report("joining Ray" if config.address else "starting Ray")
        _connect(config)
        # 4) the shards: load, self-test
        self._deployment = Deployment(
            DeploymentConfig(
                name=config.name,
                source=config.source,
                stages=config.stages,
                ranks=config.ranks,
                dtype=config.dtype,
                random_weights_seed=config.random_weights_seed,
                offload_bytes=config.offload_bytes,
            )
        )
        description = self._deployment.start(self._report)
        policy = PassPolicy(budget_tokens=config.budget_tokens)
        limits = replace(description.limits, pass_tokens=wave_tokens(policy, config.stages))
        description = replace(description, limits=limits)
        # 5) the loop, not running yet, and the word to the gateway
        awake = threading.Event()
        self._dispatcher = Dispatcher(
            self._store,
            description,
            self._deployment.shards(awake.set),
            policy,
            awake=awake,
            recover=self._recover,
            max_active=config.max_active,
        )
        self._store.publish(config.name, _published(config, description))
        self._address = discovery.publish(_reachable(config.url)) if config.url else None
        self._say(DeploymentState.READY, f"{config.stages} x {config.ranks} shards are loaded and self-tested")

    def _recover(self, loss: PolytraceError) -> None:
        """Shards that were lost are started again; requests are taken meanwhile, and wait."""
        _log.warning("%s; recovering", loss)
        self._say(DeploymentState.READY, f"recovering: {loss}")
        self._deployment.recover(lambda line: self._say(DeploymentState.READY, f"recovering: {line}"))
        config = self._config
        self._say(DeploymentState.READY, f"{config.stages} x {config.ranks} shards are whole again after a loss")

    def _report(self, line: str) -> None:
        self._say(DeploymentState.STARTING, line)

    def _say(self, state: DeploymentState, progress: str) -> None:
        self._store.set_state(self._config.name, state, progress)


def _connect(config: ControllerConfig) -> None:
    """Joins a cluster, or starts one that ends with this process."""
    if config.address is not None:
        _join(config.address)
        return
    ray.init(
        address="local",  # whatever RAY_ADDRESS says: joining is asked for by name
        namespace=discovery.NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=config.ray_folder,
    )
    if config.ray_folder is not None:
        address_file(config.ray_folder).write_text(ray.get_runtime_context().gcs_address)


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


def _published(config: ControllerConfig, description: ModelDescription) -> Published:
    return Published(
        source=config.source,
        dtype=config.dtype,
        description=json.dumps(to_json(description)).encode(),
        tokenizer=tokenizer_json(config.source),
    )


def _reachable(url: str) -> str:
    """The gateway's URL for other nodes of the cluster, when it listens on every address."""
    parts = urlsplit(url)
    if parts.hostname not in ("0.0.0.0", "::"):
        return url
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return f"{parts.scheme}://{address}:{parts.port}"
