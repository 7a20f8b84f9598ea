"""The routes that take requests: submit, take back, validate.

A submit may wait for its result (`Prefer: wait=SECONDS`). A client that disconnects while it waits this way cancels its
request: nobody else knows its id. One that has the id (202), or sent a key (`api.idempotency`), may come and go.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from api import problems
from api.admission import Admission
from api.answers import Answers
from api.away import AwayError
from api.callers import caller_of, owner_of
from api.classes import is_interactive
from api.idempotency import AcceptedBeforeError, Returning, check_same, key_of, submit_of_file
from api.limits import Terms
from api.log_lines import about_call
from api.served import Deployments, Served
from api.settings import GatewaySettings
from api.status import RequestStatus
from api.store import Store
from api.uploads import receive
from api.waiting import Expected, Waiting
from api.worker import Verdict
from polytrace.errors import PolytraceError, UserError
from scheduling.plan import RequestId


class SubmitRoutes:
    """`cancel` answers a caller who cancels a request. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        settings: GatewaySettings,
        deployments: Deployments,
        admission: Admission,
        waiting: Waiting,
        returning: Returning,
        answers: Answers,
        cancel: Callable[[str, Request], Awaitable[Response]],
    ) -> None:
        self._store = store
        self._settings = settings
        self._deployments = deployments
        self._admission = admission
        self._waiting = waiting
        self._returning = returning
        self._answers = answers
        self._cancel = cancel

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/models/{name}/validate", self.validate, methods=["POST"])
        router.add_api_route("/models/{name}/requests", self.submit, methods=["POST"])
        router.add_api_route("/models/{name}/requests", self.take_back, methods=["DELETE"])

    async def submit(self, name: str, request: Request) -> Response:
        """Checks and accepts a request. Answers with its result, or 202 when the caller does not wait long enough."""
        caller, key = caller_of(request), key_of(request)
        is_waited_for = is_interactive(request, preferred_wait(request, self._settings.max_wait_s))
        if key is not None and (before := await self._submitted(key, name, request)) is not None:
            return await self._followed(before, request)
        served = self._deployments.taking(name, caller)
        terms = await self._admission.begin(caller, name)
        request_id = self._store.new_id()
        about_call(request=request_id)
        # who waits is told nothing before the end, which is durable; or else what `Answers` secures first
        is_durable = preferred_wait(request, self._settings.max_wait_s) <= 0 or self._store.objects is not None
        try:
            await self._receive(request_id, request, served, terms)
            checked = self._admission.checked(request_id, served, caller, terms)
            if is_durable:
                verdict, _ = await asyncio.gather(checked, to_thread.run_sync(self._store.received.sync, request_id))
            else:
                verdict = await checked
        except ClientDisconnect:
            self._store.received.discard(request_id)
            return problems.left()
        except BaseException:
            self._store.received.discard(request_id)
            raise
        expected = self._waiting.expect(request_id)
        try:
            status = await self._accepted(request_id, served, request, terms, verdict, is_waited_for, is_durable)
            return await self._followed(status, request, expected if status.id == request_id else None)
        finally:
            self._waiting.give_up(request_id, expected)

    async def take_back(self, name: str, request: Request) -> Response:
        """Cancels what was, or is about to be, accepted by the `Idempotency-Key`: its sender waits no more. Tells its
        status; `id` is null when nothing has been accepted yet.
        """
        if (key := key_of(request)) is None:
            raise UserError("say which submit by the Idempotency-Key that it was sent with")
        self._returning.take_back(owner_of(request), key)  # before looking: it may be accepted just now
        known = await to_thread.run_sync(self._store.submitted, owner_of(request), key)
        if known is not None:
            return await self._cancel(known[0], request)
        self._deployments.get(name, caller_of(request))
        return JSONResponse({"id": None})

    async def validate(self, name: str, request: Request) -> Response:
        """The certificate of a request: what it would cost and return. Nothing runs, nothing is kept."""
        caller = caller_of(request)
        served = self._deployments.get(name, caller)
        request_id = self._store.new_id()
        try:
            terms = await self._admission.ask(caller, name)
            await self._receive(request_id, request, served, terms)
            verdict = await self._admission.checked(request_id, served, caller, terms, certify=True)
            certificate = await self._admission.certificate(request_id, served, caller, terms, verdict)
        except ClientDisconnect:
            return problems.left()
        finally:
            self._store.received.discard(request_id)
        return Response(certificate, media_type="application/json")

    async def _accepted(
        self,
        request_id: RequestId,
        served: Served,
        request: Request,
        terms: Terms,
        verdict: Verdict,
        is_waited_for: bool,
        is_durable: bool,
    ) -> RequestStatus:
        """The request, in the store; or how the one does that was accepted by its key at the same time."""
        caller, key = caller_of(request), key_of(request)
        try:
            submit = None if key is None else submit_of_file(key, terms.model, self._store.request_path(request_id))
            return await self._admission.accept(
                request_id,
                served,
                caller,
                terms,
                verdict,
                is_interactive=is_waited_for,
                submit=submit,
                is_durable=is_durable,
            )
        except PolytraceError as error:
            if not (isinstance(error, AwayError) and error.may_be_done):  # else a sweep sees whether it was accepted
                self._store.received.discard(request_id)
            raise
        except AcceptedBeforeError as before:
            self._store.received.discard(request_id)
            return await self._waiting.until_final(before.request, 0.0, caller)

    async def _receive(self, request_id: RequestId, request: Request, served: Served, terms: Terms) -> None:
        most, whose = self._admission.max_bytes(terms, served)
        path = self._store.request_path(request_id)
        room = self._admission.uploads.of(terms.tenant, request_id)
        try:
            await receive(request, path, max_bytes=most, idle_s=self._settings.upload_idle_s, whose=whose, room=room)
        except BaseException:
            room.release()  # else once it was checked
            raise

    async def _submitted(self, key: str, name: str, request: Request) -> RequestStatus | None:
        """How the request does that was accepted by this key before, None when there is none."""
        known = await to_thread.run_sync(self._store.submitted, owner_of(request), key)
        if known is None:
            return None
        await check_same(known[1], name, request, idle_s=self._settings.upload_idle_s)
        return await self._waiting.until_final(known[0], 0.0, caller_of(request))

    async def _followed(self, status: RequestStatus, request: Request, expected: Expected | None = None) -> Response:
        """The answer to a submit: what came of it within the time that the caller waits, else how it stands."""
        key = key_of(request)
        if key is not None and self._returning.is_taken_back(owner_of(request), key):
            cancelled = await to_thread.run_sync(self._store.cancel, status.id)
            status = cancelled or status
        if (wait_s := preferred_wait(request, self._settings.max_wait_s)) <= 0:
            return await self._answers.answer(status)
        returning = None if key is None else self._returning
        if returning is not None:
            returning.come(status.id)
        waited = None
        try:
            is_cancelling = returning is None
            waited = await self._waiting.for_caller(
                status, request, wait_s, is_cancelling=is_cancelling, expected=expected
            )
        finally:
            if returning is not None:
                returning.go(status.id, has_heard=waited is not None)
        return problems.left() if waited is None else await self._answers.answer(waited)


def preferred_wait(request: Request, most_s: float) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240), at most so many; 0 when there is none."""
    found = re.search(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9}(?:\.\d+)?)', request.headers.get("prefer", ""))
    return min(float(found[1]), most_s) if found else 0.0
