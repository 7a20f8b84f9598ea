"""One replica of a deployment: its shards, its loop, and its share of the requests, from start to end.

Lives on a thread of its own. Lost shards it mends (`Deployment.recover`); meanwhile its requests go to another replica,
or wait for it when there is none. What cannot be mended is given up and made anew, a few times. Nothing that happens
here ends the controller.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace

from cluster.config import ControllerConfig, DeploymentSpec, ShareAcross
from cluster.deployment import Deployment, DeploymentConfig
from cluster.dispatch import Dispatcher
from cluster.requests import DeploymentState, Published, ReplicaStatus
from cluster.shares import Share
from engine.fetching import here
from engine.tokenizer import tokenizer_json
from polytrace.codec import to_json
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.tokenizer import decoder_of
from scheduling.policy import PassPolicy, most_wave_rows

MAX_RESTARTS = 3  # from nothing, within the window below; then it has failed
RESTART_WINDOW_S = 600.0

_log = logging.getLogger(__name__)


class MovedError(PolytraceError):
    """Other replicas take requests while this one is not whole: its own go there."""


class Replica:
    """One copy of a deployment's model. `start` returns at once; `retire` and `stop` may be called at any time."""

    def __init__(
        self,
        number: int,
        spec: DeploymentSpec,
        config: ControllerConfig,
        share: Share,
        *,
        has_others: Callable[[], bool],  # whether another replica takes requests now
        agree: Callable[[ModelDescription], None],  # raises when it is not the model that the others serve
        changed: Callable[[], None],  # its state; from any thread
    ) -> None:
        self.number = number
        self.state, self.progress = DeploymentState.STARTING, "starting"
        self.is_retiring = False
        self.files: Mapping[str, frozenset[str]] = {}  # by node: those of the weights that its shards read
        self._spec = spec
        self._config = config
        self._share = share
        self._has_others = has_others
        self._agree = agree
        self._changed = changed
        self._deployment: Deployment | None = None
        self._dispatcher: Dispatcher | None = None
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"replica {spec.name}/{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def holds(self) -> Mapping[str, float]:
        """Of the cluster."""
        deployment = self._deployment
        return {} if deployment is None else deployment.holds

    @property
    def lacks(self) -> Mapping[str, float]:
        """Of the cluster, while it waits for room."""
        deployment = self._deployment
        return deployment.lacks if deployment is not None and deployment.is_waiting else {}

    def retire(self) -> None:
        """It is given no more requests, finishes those that it has begun, and ends (`end_if_idle`)."""
        self.is_retiring = True
        self._share.stop_taking()
        self._say(DeploymentState.DRAINING if self.state.is_serving else self.state, "finishes what it has, and ends")
        self.end_if_idle()

    def end_if_idle(self) -> None:
        """Ends it when it is to retire and has nothing left to run."""
        if not self.is_retiring:
            return
        if self._share.is_taking:  # it became whole just when it was told to retire
            self._share.stop_taking()
        if self._share.num_requests == 0:
            self.stop()

    def stop(self) -> None:
        """Ends it soon, after the round of the loop that it is in; what it has not finished goes back."""
        if self._is_stopped.is_set():
            return
        self._is_stopped.set()
        dispatcher, deployment = self._dispatcher, self._deployment
        if dispatcher is not None:
            dispatcher.stop()
        elif deployment is not None:  # it waits for room, processes or weights; its end may take seconds
            threading.Thread(target=deployment.stop, name="stop", daemon=True).start()

    def has_ended(self) -> bool:
        """Whether all that it had is given back: requests, processes, places in the cluster."""
        return not self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            number=self.number,
            state=self.state,
            progress=self.progress,
            requests=self._share.num_requests,
            work=self._share.work,
        )

    # --- its thread

    def _run(self) -> None:
        breakdowns: list[float] = []
        while not self._is_stopped.is_set():
            try:
                self._live()
            except Exception as error:  # noqa: BLE001  the edge of the thread
                if self._is_stopped.is_set():
                    break
                told = _told(error)
                about = {"model": self._spec.name}
                _log.warning("replica %d of %s: %s", self.number, self._spec.name, told, extra=about)
                breakdowns = [then for then in breakdowns if time.monotonic() - then < RESTART_WINDOW_S]
                breakdowns.append(time.monotonic())
                was_up = self._dispatcher is not None
                self._end(is_clean=False)
                if not was_up or len(breakdowns) > MAX_RESTARTS:
                    self._say(DeploymentState.FAILED, told)
                    return
                self._say(DeploymentState.STARTING, f"starting anew: {told}")
        self._end(is_clean=True)
        self._say(DeploymentState.STOPPED, "stopped")

    def _live(self) -> None:
        """From nothing to the end of its loop, through losses."""
        # 1) shards: room, weights, self-test
        self._deployment = deployment = Deployment(_deployment_config(self._spec))
        description = deployment.start(lambda line: self._say_on_the_way(DeploymentState.STARTING, line))
        self.files = deployment.files()
        policy = PassPolicy(
            budget_tokens=self._config.budget_tokens,
            tells_of_other_tenants=self._spec.share_across is ShareAcross.DEPLOYMENT,
            merges_calls=self._spec.merges_calls,
        )
        limits = replace(description.limits, pass_tokens=most_wave_rows(policy, self._spec.stages))
        description = replace(description, limits=limits)
        self._agree(description)
        # 2) the loop, again after every loss that has sent its requests elsewhere
        awake = threading.Event()
        shards = deployment.shards(awake.set)
        while True:
            self._dispatcher = Dispatcher(
                self._share,
                description,
                shards,
                policy,
                awake=awake,
                recover=self._recover,
                max_active=self._config.max_active,
                decode=decoder_of(tokenizer_json(here(self._spec.source))),
                shares=self._share.fair,
                shares_across_tenants=self._spec.share_across is ShareAcross.DEPLOYMENT,
            )
            if self._is_stopped.is_set():  # looked at behind the assignment: `stop` looks in the other order
                return
            self._take()
            try:
                self._dispatcher.run_forever()
                return
            except MovedError:
                self._share.give_back(self._dispatcher.suspects)
            deployment.recover(lambda line: self._say_on_the_way(DeploymentState.RECOVERING, line))

    def _take(self) -> None:
        """Whole, and ready for requests."""
        size = f"{self._spec.stages} x {self._spec.ranks}"
        state = DeploymentState.DRAINING if self.is_retiring else DeploymentState.READY
        self._say(state, f"{size} shards are loaded and self-tested")
        if not self.is_retiring:
            self._share.begin_taking()

    def _recover(self, loss: PolytraceError) -> None:
        """Called by the loop, which has nothing in flight: new shards for lost ones, while its requests wait.

        Raises MovedError as soon as they need not wait, because another replica takes requests.
        """
        about = {"model": self._spec.name}
        _log.warning("replica %d of %s: %s; recovering", self.number, self._spec.name, loss, extra=about)
        assert self._deployment is not None
        self._share.stop_taking()

        def report(line: str) -> None:
            self._say_on_the_way(DeploymentState.RECOVERING, line)
            if self._has_others():
                raise MovedError(loss.message)

        report(str(loss))
        self._deployment.recover(report)
        self._take()

    def _end(self, *, is_clean: bool) -> None:
        """Gives back what it has."""
        if is_clean:
            self._share.give_back(())
        else:
            self._share.break_down()
        self._dispatcher = None
        if self._deployment is not None:
            self._deployment.stop()
            self._deployment = None

    def _say_on_the_way(self, state: DeploymentState, line: str) -> None:
        """While shards are started or started again; raises when nobody wants them any more."""
        if self._is_stopped.is_set():
            raise MovedError("it is stopped")
        is_waiting = self._deployment is not None and self._deployment.is_waiting
        self._say(DeploymentState.WAITING if is_waiting else state, line)

    def _say(self, state: DeploymentState, progress: str) -> None:
        self.state, self.progress = state, progress
        self._changed()


def published(spec: DeploymentSpec, description: ModelDescription) -> Published:
    """What a deployment tells the gateway once its first replica is ready."""
    return Published(
        source=spec.source,
        dtype=spec.dtype,
        description=json.dumps(to_json(description)).encode(),
        tokenizer=tokenizer_json(here(spec.source)),
    )


def _deployment_config(spec: DeploymentSpec) -> DeploymentConfig:
    return DeploymentConfig(
        name=spec.name,
        source=spec.source,
        stages=spec.stages,
        ranks=spec.ranks,
        dtype=spec.dtype,
        device=spec.device,
        cpus=spec.cpus,
        random_weights_seed=spec.random_weights_seed,
        offload_bytes=spec.offload_bytes,
        merges_calls=spec.merges_calls,
        whole=spec.whole,
        device_map=spec.device_map,
        gpus=spec.gpus,
    )


def _told(error: Exception) -> str:
    if isinstance(error, PolytraceError):
        return str(error)
    return "".join(traceback.format_exception(error)[-3:]).strip()
