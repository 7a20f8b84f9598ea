"""Which replica of a deployment runs which request.

The controller claims waiting requests and gives each to the least loaded replica that takes any: the one whose requests
have the least work left, counted in rows x layers that they run through, whether they wait or are in a pass. There a
request stays. Tenants are asked in the order of their counters (`scheduling.fair`), and none may hold more than is free
beside it: so there is room for another tenant however many requests one has. What a replica cannot run, because it lost
shards or is about to end, goes back to the store and to whoever takes it then: all of it again from its first wave, so
with the same bits.

A `Share` is the store as one replica sees it: only what was given to that replica can be claimed there. Knows nothing
of Ray, shards or plans.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from cluster.kept_shares import KeptShares
from cluster.requests import Claimed, ControllerStore, Finished, LeftBehind, PassFigures, Place, ResultPlace
from scheduling.fair import FairShares
from scheduling.plan import RequestId
from scheduling.scheduler import Progress

WEIGH_S = 5.0  # between two looks at the weights of tenants


class Load(Protocol):
    """What a choice between replicas needs to know of one."""

    work: int  # rows x layers that its requests run through


AnyLoad = TypeVar("AnyLoad", bound=Load)


class Shares:
    """The shares of one deployment. Any thread."""

    def __init__(self, store: ControllerStore, model: str, *, max_active: int) -> None:
        self.store = store
        self.model = model
        self.max_active = max_active  # requests of one replica
        self._kept = KeptShares(store, model)
        self.fair = self._kept.fair  # of all replicas
        self.lock = threading.Lock()
        self.has_more = False  # the store, of tenants that may not hold more now
        self.last_given = 0.0  # by the store's clock: when it gave out a request
        self._weighed = -math.inf
        self._all: list[Share] = []

    def open(self) -> Share:
        """A share for another replica. It takes nothing before it is told to."""
        share = Share(self)
        with self.lock:
            self._all.append(share)
        return share

    def close(self, share: Share) -> None:
        """The share of a replica that has ended; what it had must have been given back."""
        with self.lock:
            self._all.remove(share)
        self.fair.close(share)

    def has_others(self, share: Share) -> bool:
        """Whether another replica takes requests now."""
        with self.lock:
            return any(other.is_taking for other in self._all if other is not share)

    def give_out(self) -> None:
        """Claims what replicas have room for, and wakes all of them: for requests, and for cancellations."""
        self._weigh()
        while True:
            with self.lock:
                self.has_more = False
                room = sum(share.room for share in self._all if share.is_taking)
                # under the lock: nobody stops taking in between
                claims = self.store.claim(self.model, room, self._divide)
                for claimed in claims:
                    takers = [share for share in self._all if share.is_taking and share.room > 0]
                    least_loaded(takers).put(claimed)
            if not claims:
                break
            self.last_given = self.store.now()
        self._kept.save()
        for share in self._all:  # they look for cancellations
            share.interrupt()

    def save(self) -> None:
        """Keeps who was served how much: the controller ends."""
        self._kept.save(is_last=True)

    def _weigh(self) -> None:
        """Looks at the tenants' weights now and then."""
        if time.monotonic() - self._weighed > WEIGH_S:
            self._weighed = time.monotonic()
            self.fair.weigh(self.store.weights())

    def _divide(self, tenants: Sequence[str], room: int) -> dict[str, int]:
        held: Counter[str] = Counter()
        for share in self._all:
            held.update(share.tenants())
        self.has_more = bool(tenants)
        return divided(self.fair, tenants, held, room)


def divided(fair: FairShares, tenants: Sequence[str], held: Mapping[str, int], room: int) -> dict[str, int]:
    """How many more of its waiting requests each tenant may have in memory, of so many that there is room for: in
    turns, whoever was served least first, while it holds no more than is free (dynamic thresholds: Choudhury and Hahne,
    IEEE/ACM Transactions on Networking 6, 1998).
    """
    given: dict[str, int] = {}
    asking = deque(fair.order(tenants))
    free = room
    while asking and free > 0:
        tenant = asking.popleft()
        if held.get(tenant, 0) + given.get(tenant, 0) <= free:
            given[tenant] = given.get(tenant, 0) + 1
            free -= 1
            asking.append(tenant)
    return given


def least_loaded(shares: Sequence[AnyLoad]) -> AnyLoad:
    """The one with the least work; of equals the first, so that a quiet service keeps one replica warm."""
    return min(shares, key=lambda share: share.work)


class Share:
    """The store as one replica sees it (`cluster.requests.RequestStore`, as far as a replica's loop needs it)."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._store = shares.store
        self._woken = threading.Event()
        self._given: deque[Claimed] = deque()  # not taken by the replica's loop yet
        self._taken: dict[RequestId, Claimed] = {}  # taken and not ended
        self._with_loop: Counter[str] = Counter()  # of these, by tenant
        self.work = 0
        self.is_taking = False

    @property
    def num_requests(self) -> int:
        return len(self._given) + len(self._taken)

    @property
    def room(self) -> int:
        return self._shares.max_active - self.num_requests

    @property
    def fair(self) -> FairShares:
        return self._shares.fair

    def tenants(self) -> list[str]:
        """Whose requests it has, one by one. For `Shares`, which holds the lock."""
        return [claimed.tenant for claimed in (*self._given, *self._taken.values())]

    def put(self, claimed: Claimed) -> None:
        """Gives the replica a request. For `Shares`, which holds the lock."""
        self._given.append(claimed)
        self.work += claimed.work
        self.interrupt()

    def begin_taking(self) -> None:
        """The replica runs requests from now on."""
        self.is_taking = True
        self._store.interrupt()  # some may be waiting

    def stop_taking(self) -> None:
        """It is given no more, and what its loop has not taken yet goes to others."""
        with self._shares.lock:
            self.is_taking = False
            given = [claimed.request for claimed in self._given]
            self.work -= sum(claimed.work for claimed in self._given)
            self._given.clear()
        if given:
            self._store.give_back(given, ())

    def give_back(self, suspects: Iterable[RequestId]) -> None:
        """Everything that has not ended goes back, when no loop runs any more; the `suspects` to be run alone. The
        store counts, and refuses one that was suspected too often.
        """
        self.stop_taking()
        with self._shares.lock:
            taken, self._taken = self._taken, {}
            self._with_loop.clear()
            self.work = 0
        self.fair.close(self)
        self._store.give_back(taken, suspects)

    def break_down(self) -> None:
        """The same when the loop itself broke: whatever it had may be the cause."""
        self.give_back(list(self._taken))

    # --- cluster.requests.RequestStore

    def claim(self, model: str, limit: int) -> list[Claimed]:
        """In turns of the tenants: whoever has fewest with the loop by its weight, so that one whose many are worked
        out one by one does not keep another waiting.
        """
        claims: list[Claimed] = []
        with self._shares.lock:
            while self._given and len(claims) < limit:
                claimed = self._next()
                if claims and claimed.is_suspect:
                    break
                self._given.remove(claimed)
                claims.append(claimed)
                self._taken[claimed.request] = claimed
                self._with_loop[claimed.tenant] += 1
                if claimed.is_suspect:
                    break
        return claims

    def _next(self) -> Claimed:
        """Of what was given: the first of the tenant whose turn it is."""
        weight = self.fair.weight
        return min(self._given, key=lambda claimed: self._with_loop[claimed.tenant] / weight(claimed.tenant))

    def cancellations(self, model: str) -> list[RequestId]:
        return [request for request in self._store.cancellations(model) if request in self._taken]

    def place_result(self, request: RequestId, room: int, data_bytes: int) -> ResultPlace:
        return self._store.place_result(request, room, data_bytes)

    def place_left(self, request: RequestId, left: Sequence[LeftBehind]) -> list[Place]:
        return self._store.place_left(request, left)

    def finish(self, finished: Sequence[Finished]) -> None:
        self._store.finish(finished)
        with self._shares.lock:
            had_no_room = self.room <= 0
            for end in finished:
                claimed = self._taken.pop(end.request, None)
                if claimed is not None:
                    self._with_loop[claimed.tenant] -= 1
                self.work -= 0 if claimed is None else claimed.work
        if had_no_room or self._shares.has_more or not self.is_taking:
            self._store.interrupt()  # others wait for the room, or the controller for the last one to end

    def note_progress(self, progress: Sequence[Progress]) -> None:
        self._store.note_progress(progress)

    def note_pass(self, model: str, told: PassFigures) -> None:
        self._store.note_pass(model, told)

    def note_planning(self, request: RequestId, seconds: float) -> None:
        self._store.note_planning(request, seconds)

    def wait_for_requests(self, timeout_s: float) -> None:
        self._woken.wait(timeout_s)
        self._woken.clear()

    def interrupt(self) -> None:
        self._woken.set()
