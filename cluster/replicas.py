"""One deployment: a model under a name, as many times as is wanted.

Works towards what the store wants of it, one small step at a time and never waiting: replicas live on threads of their
own. Sums up how they do for people and for the gateway. When it says that it is over, nothing of it is left.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

from cluster.config import ControllerConfig, Heat, Mode, Wanted
from cluster.demand import Standing, total
from cluster.replica import Replica, published
from cluster.requests import ControllerStore, DeploymentState, ReplicaStatus
from cluster.shares import Share, Shares
from cluster.warmth import Warmth
from polytrace.description import ModelDescription, serve_the_same
from polytrace.errors import CapacityError, ServiceError

_TELL_S = 0.5  # between two words about queues: they change with every request
_USED_S = 10.0  # between two words about when it was used

# The state of a deployment is that of its best replica.
_ORDER = (
    DeploymentState.READY,
    DeploymentState.RECOVERING,
    DeploymentState.STARTING,
    DeploymentState.WAITING,
    DeploymentState.FAILED,
    DeploymentState.DRAINING,
    DeploymentState.STOPPED,
)


class ReplicaSet:
    """The replicas of one deployment. For the controller's thread."""

    def __init__(self, store: ControllerStore, config: ControllerConfig, wanted: Wanted) -> None:
        self._store = store
        self._config = config
        self._wanted = wanted
        self._name = wanted.spec.name
        self._shares = Shares(store, self._name, max_active=config.max_active)
        self._replicas: list[tuple[Replica, Share]] = []
        self._description: ModelDescription | None = None
        self._lock = threading.Lock()
        self._num_open = 0  # requests that have not ended, when it matters
        self._told: tuple[DeploymentState, str] | None = None
        self._told_replicas: tuple[float, list[ReplicaStatus]] = (0.0, [])
        self._warmth = Warmth(self._name)
        self._used = wanted.last_used or 0.0  # when it had its last request, or became ready
        self._told_used = self._used
        self.note = ""  # why nobody makes room for it

    def give_out(self) -> None:
        """Gives waiting requests to the replicas."""
        self._shares.give_out()

    def pursue(self, wanted: Wanted) -> bool:
        """One step towards what is wanted, and word of it. False when it was to be removed and is gone."""
        is_hot = wanted.heat is Heat.HOT
        for replica, share in list(self._replicas):
            replica.end_if_idle()
            # one that failed stays as long as somebody has to be told why
            has_failed = replica.state is DeploymentState.FAILED
            if replica.has_ended() and not (has_failed and (is_hot or self._num_open)):
                self._drop(replica, share)
        # one that rests and has nothing left gets no request without becoming hot first
        may_have = self._replicas or self._num_open or self._told is None or wanted != self._wanted
        is_asked = wanted.mode is not Mode.SERVING or (not is_hot and may_have)
        self._num_open = self._store.num_open(self._name) if is_asked else 0
        is_over = False
        if wanted.mode is Mode.DROPPING or (wanted.mode is Mode.REMOVING and self._num_open == 0):
            is_over = self._wind_up()
        else:
            self._adjust(wanted)
        self._wanted = wanted
        if not is_over:
            self._tell()
        return not is_over

    def stop(self) -> None:
        """Every replica ends soon."""
        self._warmth.release()
        for replica, _ in self._replicas:
            replica.stop()

    def standing(self, now: float) -> Standing:
        """How it stands among the others."""
        is_busy = any(share.num_requests for _, share in self._replicas)
        is_drained = self._wanted.mode is Mode.DRAINING and self._num_open == 0  # nobody makes room for it
        if is_busy:
            self._used = now
        self._used = max(self._used, self._shares.last_given)
        if self._used - self._told_used > _USED_S:
            self._told_used = self._used
            self._store.note_used(self._name, self._used)
        return Standing(
            wanted=self._wanted,
            state=self._state,
            progress=self._told[1] if self._told is not None else "",
            is_busy=is_busy,
            used=self._used,
            holds=total(replica.holds for replica, _ in self._replicas),
            lacks={}
            if is_drained
            else total(replica.lacks for replica, _ in self._replicas if not replica.is_retiring),
        )

    @property
    def _state(self) -> DeploymentState:
        """As it was told last."""
        return DeploymentState.STARTING if self._told is None else self._told[0]

    def join(self, timeout_s: float) -> None:
        """Waits for their ends, and keeps what tenants were served."""
        deadline = time.monotonic() + timeout_s
        for replica, _ in self._replicas:
            replica.join(max(0.0, deadline - time.monotonic()))
        self._shares.save()

    def _adjust(self, wanted: Wanted) -> None:
        """As many replicas as are wanted; those that failed once more when it was deployed again."""
        if wanted.revision != self._wanted.revision:
            for replica, share in list(self._replicas):
                if replica.state is DeploymentState.FAILED:
                    self._drop(replica, share)
        is_resting = wanted.heat is not Heat.HOT and self._num_open == 0
        number = 0 if is_resting else wanted.spec.replicas
        if wanted.heat is Heat.WARM and is_resting:
            self._warmth.hold(wanted.spec.source, [replica.files for replica, _ in self._replicas])
        elif wanted.heat is Heat.COLD or self._state is DeploymentState.READY:
            self._warmth.release()
        if is_resting and not self._replicas:
            self._description = None  # its files may have changed when it is loaded again
        staying = [replica for replica, _ in self._replicas if not replica.is_retiring]
        for _ in range(number - len(staying)):
            self._add(wanted)
        by_worth = sorted(staying, key=lambda replica: (_ORDER.index(replica.state), replica.number))
        for replica in by_worth[number:]:
            replica.retire()

    def _wind_up(self) -> bool:
        """Ends the replicas; whether nothing of the deployment is left."""
        self.stop()
        if not all(replica.has_ended() for replica, _ in self._replicas):
            return False
        told = f"{self._name} was removed from the service before this request was finished"
        self._store.refuse(self._name, CapacityError(told))
        self._store.forget(self._name)
        return True

    def _add(self, wanted: Wanted) -> None:
        share = self._shares.open()
        taken = {replica.number for replica, _ in self._replicas}
        replica = Replica(
            next(number for number in range(len(taken) + 1) if number not in taken),
            wanted.spec,
            self._config,
            share,
            has_others=lambda: self._shares.has_others(share),
            agree=self._agree,
            changed=self._store.interrupt,
        )
        self._replicas.append((replica, share))
        replica.start()

    def _drop(self, replica: Replica, share: Share) -> None:
        self._replicas.remove((replica, share))
        self._shares.close(share)

    def _agree(self, description: ModelDescription) -> None:
        """The first replica's description is the deployment's; every other one must have the same."""
        with self._lock:
            if self._description is None:
                self._publish(description)
                self._description = description
            elif not serve_the_same(description, self._description):
                source = self._wanted.spec.source
                raise ServiceError(f"{self._name}: {source} here is not what the other replicas serve")

    def _publish(self, description: ModelDescription) -> None:
        """What is served from now on. Requests that were checked against another model's description are refused."""
        before, now = self._store.published(self._name), published(self._wanted.spec, description)
        self._store.publish(self._name, now)
        known = None if before is None else json.loads(before.description).get("fingerprint")
        if known not in (None, description.fingerprint):
            told = f"{self._name} is another model than when this request was accepted; send it again"
            self._store.refuse(self._name, ServiceError(told))

    # --- what people are told

    def _tell(self) -> None:
        summary = self._summary()
        if summary != self._told:
            if summary[0] is DeploymentState.READY and self._state is not DeploymentState.READY:
                self._used = max(self._used, self._store.now())
            self._told = summary
            self._store.set_state(self._name, *summary)
        then, told = self._told_replicas
        statuses = [replica.status() for replica, _ in self._replicas]
        is_time = time.monotonic() - then > _TELL_S or [one.state for one in told] != [one.state for one in statuses]
        if statuses != told and is_time:
            self._told_replicas = (time.monotonic(), statuses)
            self._store.set_replicas(self._name, statuses)

    def _summary(self) -> tuple[DeploymentState, str]:
        staying = sorted(
            (replica for replica, _ in self._replicas if not replica.is_retiring),
            key=lambda replica: (_ORDER.index(replica.state), replica.number),
        )
        told = staying[0].progress if len(staying) == 1 else _tell_many(staying)
        state = staying[0].state if staying else DeploymentState.STOPPED
        if state is DeploymentState.WAITING and self.note:
            told = f"{told}; {self.note}"
        if self._wanted.heat is not Heat.HOT:
            state, told = self._resting(state, told)
        if self._wanted.mode is Mode.SERVING:
            return state, told
        done = "drained" if self._wanted.mode is Mode.DRAINING else "removed"
        if self._num_open == 0 and self._wanted.mode is Mode.DRAINING:
            return drained(self._name, state, told)
        if self._num_open == 0:
            return DeploymentState.DRAINING, "is removed"
        left = f"{done} when {self._num_open} requests are finished"
        return (DeploymentState.DRAINING, left) if state.is_serving else (state, f"{left}; {told}")

    def _resting(self, state: DeploymentState, told: str) -> tuple[DeploymentState, str]:
        """Of one that is to be no more than warm."""
        why = self._wanted.why
        if self._num_open:
            return state, f"{told}; rests when {self._num_open} requests are finished ({why})"
        if self._replicas:
            return DeploymentState.DRAINING, f"its shards end: {why}"
        if self._wanted.heat is Heat.COLD:
            return DeploymentState.COLD, why
        is_warm, how = self._warmth.told()
        return (DeploymentState.WARM if is_warm else DeploymentState.COLD), f"{why}; {how}"


def drained(name: str, state: DeploymentState, told: str) -> tuple[DeploymentState, str]:
    """What people are told of a deployment that is drained and has nothing left. One that could not serve again at once
    says what keeps it.
    """
    until = f"until `polytrace resume {name}`"
    if state in (DeploymentState.READY, DeploymentState.WARM, DeploymentState.COLD):
        return DeploymentState.DRAINED, f"it takes no requests {until}"
    return state, f"drained {until}; {told}"


def _tell_many(replicas: Sequence[Replica]) -> str:
    ready = sum(replica.state is DeploymentState.READY for replica in replicas)
    others = [f"replica {each.number} {each.progress}" for each in replicas if each.state is not DeploymentState.READY]
    return "; ".join([f"{ready} of {len(replicas)} replicas are ready", *others])
