"""Who is let in: a request's certificate held against its tenant's and its deployment's limits, before it queues.

The story of one: `begin` (may the caller ask at all now, and how large may the body be), `checked` (a worker's verdict,
held against the limits of one request), `accept` (the quotas, in the transaction that stores it). A refusal has the
number, the limit, whose it is, and the nearest request that would be taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from functools import partial

from anyio import to_thread

from api.bursts import Bursts
from api.figures import CHECK
from api.hops import hop
from api.idempotency import Submit
from api.identity import Identity
from api.limits import Terms, limits_from_text
from api.log_lines import about_call
from api.quotas import Rates
from api.remembered import Remembered
from api.served import Checker, Served
from api.settings import GatewaySettings
from api.status import RequestStatus
from api.store import Store
from api.upload_room import UploadRoom
from api.worker import Verdict
from polytrace.certificate import LimitLine
from polytrace.codec import to_json
from polytrace.errors import (
    CapacityError,
    ContextError,
    PolytraceError,
    QuotaError,
    ServiceError,
    TooLargeError,
    from_fields,
)
from polytrace.price_tables import MEANINGS, in_bytes
from scheduling.plan import RequestId

LOOK_S = 2.0  # limits that somebody changes hold after this time
SEARCH_S = 20  # of each minute, for one tenant: to find what would fit
_MOST_KNOWN = 10_000  # tenants and deployments whose limits are remembered


class Admission:
    """Belongs to one event loop."""

    def __init__(self, store: Store, settings: GatewaySettings, checker: Checker) -> None:
        self._store = store
        self._settings = settings
        self._checker = checker
        self._rates = Rates()
        self._bursts = Bursts(store)
        self._remembered = Remembered(checker)
        self.uploads = UploadRoom(most=settings.upload_bytes, most_of_tenant=settings.upload_bytes_of_tenant)
        self._known: dict[tuple[str, str], tuple[float, Terms]] = {}

    async def terms(self, caller: Identity, model: str) -> Terms:
        """The limits that hold for a caller's requests to a deployment."""
        key = caller.tenant, model
        found = self._known.get(key)
        if found is None or found[0] < time.monotonic():
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            terms = await to_thread.run_sync(self._look_up, *key)
            self._known[key] = found = (time.monotonic() + LOOK_S, terms)
        return found[1]

    def forget(self) -> None:
        """Limits are looked up again: somebody has changed some here."""
        self._known.clear()

    async def begin(self, caller: Identity, model: str) -> Terms:
        """Before a request is read. Raises QuotaError, or CapacityError, when too many have come in this minute."""
        terms = await self.terms(caller, model)
        if (error := await self._rate_error(terms)) is not None:
            raise error
        for owner, a_minute in _rates_of(terms):
            self._rates.take(owner, a_minute)
        return terms

    async def ask(self, caller: Identity, model: str) -> Terms:
        """Before a question is read, of which nothing comes: as `begin`, out of buckets that are full at first."""
        terms = await self.terms(caller, model)
        for owner, a_minute in _rates_of(terms):
            asked = f"questions of a {owner[0]}", owner[1]
            self._rates.begin_full(asked, a_minute)
            if (error := _too_often(owner, a_minute, self._rates.wait_s(asked, a_minute), "ask")) is not None:
                raise error
            self._rates.take(asked, a_minute)
        return terms

    def max_bytes(self, terms: Terms, served: Served) -> tuple[int, str]:
        """How long a request may be as a file, and who says so."""
        return terms.least("request_bytes", served.description.limits.max_request_bytes)

    async def checked(
        self, request: RequestId, served: Served, caller: Identity, terms: Terms, *, certify: bool = False
    ) -> Verdict:
        """The verdict of a worker on a received request.

        Raises what is wrong with it: TooLargeError, when it is beyond a limit, with the nearest that is not. To
        `certify` is to say what it takes even so; `certificate` says whether it would be taken.
        """
        path, contents = self._store.request_path(request), self._store.contents.folder_of(caller.owner)
        began = time.perf_counter()
        try:
            verdict = await self._remembered.check(terms.model, served, path, contents=contents, certify=certify)
        finally:
            self.uploads.release(request)
        seconds = time.perf_counter() - began
        self._store.tally.observe(CHECK, terms.model, value=seconds)
        about_call(check_seconds=f"{seconds:.6f}")
        if certify and verdict.error is None:
            return verdict
        return await self.held(verdict, request, served, caller, terms)

    async def held(
        self, verdict: Verdict, request: RequestId, served: Served, caller: Identity, terms: Terms
    ) -> Verdict:
        """The verdict, held against the limits of one request. Raises as `checked` does."""
        error: PolytraceError | None = None
        if verdict.error is not None:
            error = from_fields(verdict.error)
        elif (line := next((one for one in terms.lines(verdict.demand) if not one.is_within), None)) is not None:
            error = TooLargeError(_told(line))
        if error is None:
            return verdict
        if isinstance(error, TooLargeError) and not isinstance(error, ContextError):
            error = await self._with_nearest(error, request, served, caller, terms)
        raise error

    async def accept(
        self,
        request: RequestId,
        served: Served,
        caller: Identity,
        terms: Terms,
        verdict: Verdict,
        *,
        is_interactive: bool = True,
        submit: Submit | None = None,
        is_durable: bool = True,
    ) -> RequestStatus:
        """Accepts a request whose file has arrived; unless `is_durable`, `received.secure` comes before anybody is
        told. Raises what `Store.add` does.
        """
        assert verdict.facts is not None
        add = partial(
            self._store.add,
            request,
            terms.model,
            verdict.facts,
            work=verdict.work,
            max_open=self._settings.max_open,
            max_open_of_tenant=self._settings.max_open_of_tenant,
            caller=caller,
            is_interactive=is_interactive,
            demand=verdict.demand,
            terms=terms,
            result_ttl_s=self._settings.result_ttl_s,
            needs=verdict.needs,
            submit=submit,
            is_durable=is_durable,
        )
        try:
            status = await (hop(add) if is_durable else self._bursts.accept(add))
            about_call(request=request, accepted=request)
            return status
        except TooLargeError as error:
            raise await self._with_nearest(error, request, served, caller, terms) from None
        except QuotaError as error:
            left = await self._left(terms, verdict)
            told = await self._with_nearest(error, request, served, caller, terms, **left) if left else error
            raise told from None

    async def certificate(
        self, request: RequestId, served: Served, caller: Identity, terms: Terms, verdict: Verdict
    ) -> bytes:
        """The certificate as JSON, with the limits that the request is held against and whether it would be taken."""
        if verdict.certificate is None:
            raise ServiceError("the request was checked, but no certificate came of it")
        refusal: PolytraceError | None = None
        lines = list(terms.lines(verdict.demand))
        try:
            await self.held(verdict, request, served, caller, terms)
            if _has_quotas(terms):
                lines += await to_thread.run_sync(self._store.allowances.lines, terms, verdict.demand)
                check = partial(self._store.allowances.check, result_ttl_s=self._settings.result_ttl_s)
                await to_thread.run_sync(check, terms, verdict.demand)
            refusal = await self._rate_error(terms)
        except (TooLargeError, CapacityError) as error:
            refusal = error
        told = {
            "limits": to_json(lines),
            "refusal": None if refusal is None else refusal.message,
            "retry_after_s": refusal.retry_after_s if isinstance(refusal, CapacityError) else None,
        }
        return verdict.certificate[:-1] + b", " + json.dumps(told).encode()[1:]

    async def check_stored(self, caller: Identity, num_bytes: int) -> None:
        """Raises QuotaError, or TooLargeError, when a caller's tenant may not store so much more."""
        most = (await self.terms(caller, "")).tenants.bytes_stored
        if most is not None:
            await to_thread.run_sync(self._store.allowances.check_stored, caller.tenant, num_bytes, most)

    # --- inside

    def _look_up(self, tenant: str, model: str) -> Terms:
        own, of_model = self._store.allowances.limit_texts(tenant, model)
        limits = limits_from_text(own, f"the limits of tenant {tenant}").over(self._settings.limits)
        deployment = limits_from_text(of_model, f"the limits of deployment {model}")
        return Terms(tenant=tenant, model=model, tenants=limits, deployments=deployment)

    async def _rate_error(self, terms: Terms) -> PolytraceError | None:
        for owner, a_minute in _rates_of(terms):  # before any is asked: nobody comes in between
            if not self._rates.is_known(owner):
                which = {owner[0]: owner[1]}
                taken = await to_thread.run_sync(
                    partial(self._store.allowances.accepted_since, self._store.now() - 60, **which)
                )
                self._rates.begin(owner, a_minute, taken)
        for owner, a_minute in _rates_of(terms):
            if (error := _too_often(owner, a_minute, self._rates.wait_s(owner, a_minute))) is not None:
                return error
        return None

    async def _left(self, terms: Terms, verdict: Verdict) -> dict[str, int]:
        """What a tenant has left of quotas that a smaller request would keep."""
        lines = await to_thread.run_sync(self._store.allowances.lines, terms, verdict.demand)
        names = {"tokens_a_day": "tokens", "bytes_stored": "stored_bytes"}
        return {
            names[line.what]: line.limit - line.used
            for line in lines
            if line.what in names and line.limit is not None and not line.is_within
        }

    async def _with_nearest(
        self,
        error: PolytraceError,
        request: RequestId,
        served: Served,
        caller: Identity,
        terms: Terms,
        **left: int,
    ) -> PolytraceError:
        """The error, with the nearest request that would be taken where one is found.

        Who is refused again and again takes no more of the workers' time than SEARCH_S in a minute.
        """
        most = dict(_most(terms)) | left
        path, contents = self._store.request_path(request), self._store.contents.folder_of(caller.owner)
        owner = ("searches", terms.tenant)
        self._rates.begin_full(owner, SEARCH_S)
        if self._rates.wait_s(owner, SEARCH_S) > 0:
            return error
        began = time.monotonic()
        try:
            nearest = await self._checker.nearest(terms.model, served.version, path, contents=contents, most=most)
        except ServiceError:  # it is told without
            nearest = None
        self._rates.take(owner, SEARCH_S, time.monotonic() - began)
        if nearest is not None:
            error.message = f"{error.message}: {nearest}"
        return error


def _most(terms: Terms) -> Iterator[tuple[str, int]]:
    """The limits that one request is held against, by the names of `Demand`; of all owners the smallest."""
    found: dict[str, int] = {}
    for _, limits in terms.by_owner():
        for what, name in _DEMANDS.items():
            limit = getattr(limits, what)
            if limit is not None:
                found[name] = min(limit, found.get(name, limit))
    yield from found.items()


_DEMANDS = {
    "request_bytes": "request_bytes",
    "result_bytes": "stored_bytes",
    "token_layers": "token_layers",
    "passes": "passes",
    "tape_bytes": "tape_bytes",
    "tokens_a_day": "tokens",
    "bytes_stored": "stored_bytes",
}


def _rates_of(terms: Terms) -> Iterator[tuple[tuple[str, str], int]]:
    """Whose buckets a request takes of, and how much they hold."""
    if (a_minute := terms.tenants.requests_a_minute) is not None:
        yield ("tenant", terms.tenant), a_minute
    if (a_minute := terms.deployments.requests_a_minute) is not None:
        yield ("model", terms.model), a_minute


def _too_often(owner: tuple[str, str], a_minute: int, wait_s: float, verb: str = "send") -> PolytraceError | None:
    """The refusal of whoever has to wait."""
    if wait_s <= 0:
        return None
    what = "requests" if verb == "send" else "questions"
    whose = f"tenant {owner[1]} may {verb}" if owner[0] == "tenant" else f"deployment {owner[1]} takes"
    kind = QuotaError if owner[0] == "tenant" else CapacityError
    return kind(f"{whose} {a_minute} {what} a minute", retry_after_s=None if math.isinf(wait_s) else wait_s)


def _has_quotas(terms: Terms) -> bool:
    own = terms.tenants
    return any(limit is not None for limit in (own.requests_in_flight, own.tokens_a_day, own.bytes_stored))


def _told(line: LimitLine) -> str:
    """A limit that a request is not within, for people."""
    assert line.limit is not None
    if not line.what.endswith("_bytes"):
        return f"takes {line.needed:,} {MEANINGS[line.what]}, {line.whose} may take {line.limit:,} at once"
    takes, may = in_bytes(line.needed), in_bytes(line.limit)
    exact = "" if takes != may else f" ({line.needed:,} of {line.limit:,} bytes)"
    return f"{MEANINGS[line.what]} of {takes}, {line.whose} may have {may}{exact}"
