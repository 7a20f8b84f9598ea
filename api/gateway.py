"""The HTTP gateway: takes requests, tells how they do, and sends results. A process of its own that never touches Ray.

Owns the routes and their rules. Requests are checked by `api.worker`, kept by `api.store` and run by the controller;
bodies stream between socket and file, 4 MB at a time.

A submit may wait for its result (`Prefer: wait=SECONDS`). A client that disconnects while it waits this way cancels its
request: nobody else knows its id. One that has the id (202), or sent a key (`api.idempotency`), may come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI, Query
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from api import problems
from api.access import Access
from api.admission import Admission
from api.away import AwayError
from api.bodies import LimitedBodies
from api.callers import caller_of, check_role, operator_of, owner_of
from api.catalogue import Deployment
from api.claiming import Outlook
from api.classes import is_interactive
from api.document import describe
from api.drain_routes import DrainRoutes
from api.edit_routes import EditRoutes
from api.event_routes import EventRoutes, cancel_soon
from api.expiry import Expiry
from api.idempotency import AcceptedBeforeError, Returning, check_same, key_of, submit_of_file
from api.keeping import KeepingRoutes
from api.key_routes import KeyRoutes
from api.limits import Terms
from api.log_lines import about_call
from api.logs import logs_since
from api.metric_routes import MeasuredCalls, MetricRoutes
from api.model_routes import ModelRoutes
from api.oidc import Provider
from api.openai_errors import openai_route
from api.openai_routes import OpenAIRoutes
from api.purge_routes import PurgeRoutes
from api.readiness import Readiness
from api.refusals import Refusals
from api.request_routes import RequestRoutes
from api.result_response import StoredResultResponse
from api.results import ObjectResults
from api.sending import StoredFile
from api.served import Checker, Deployments, Served
from api.settings import MAX_REPLICAS, GatewaySettings, checked_spec
from api.short_way import ShortWay
from api.store import RequestState, RequestStatus, Store
from api.streams import Streams
from api.tenant_routes import TenantRoutes
from api.uploads import receive
from api.usage_routes import UsageRoutes
from api.waiting import Expected, Waiting, no_request
from api.worker import Verdict
from cluster.config import DeploymentSpec, Mode, ShareAcross
from polytrace.codec import to_json
from polytrace.errors import (
    CapacityError,
    NotFoundError,
    PolytraceError,
    UserError,
    from_fields,
)
from polytrace.versions import version_headers
from scheduling.plan import RequestId

MEDIA_TYPE = "application/vnd.safetensors"
SMALL_BYTES = 256 << 10
LOADING_S = 2.0  # that a call waits for a request whose deployment is being loaded, before it tells how far that is


class Gateway:
    """The routes' state. `app()` makes the ASGI application; its lifespan starts and ends what this holds."""

    def __init__(self, store: Store, settings: GatewaySettings, checker: Checker, key: str | None = None) -> None:
        self._store = store
        self._settings = settings
        self._checker = checker
        provider = None if settings.oidc is None else Provider(settings.oidc)
        self._access = Access(store.keys, store.tenants, own_key=key, asks=settings.asks_key, provider=provider)
        self._tenants = TenantRoutes(store.tenants, store.audit, self._tenants_changed)
        self._keys = KeyRoutes(store.keys, self._access.forget, settings.key_ttl_s)
        self._refusals = Refusals(store.audit)
        self._deployments = Deployments(store, checker, changed=lambda: self._streams.ring())
        self._readiness = Readiness(store)
        self._waiting = Waiting(store)
        self._admission = Admission(store, settings, checker)
        self._edits = EditRoutes(store, settings, checker, self._deployments, self._admission)
        self._streams = Streams(store, self._waiting)
        self._cancelling: set[asyncio.Task[None]] = set()
        self._returning = Returning(lambda request: cancel_soon(store, request, self._cancelling))
        self._expiry = Expiry(store, self._streams, settings.result_ttl_s)
        self._events = EventRoutes(store, self._waiting, self._streams, _plain, self._deployments)
        self._openai = OpenAIRoutes(
            store, checker, self._deployments, self._waiting, self._streams, self._admission, self._returning
        )
        self._keeping = KeepingRoutes(store.contents, self._admission, upload_idle_s=settings.upload_idle_s)

    def app(self) -> FastAPI:
        app = FastAPI(
            title="polytrace",
            docs_url=None,  # its pages load scripts from elsewhere
            redoc_url=None,
            redirect_slashes=False,  # to an address of the caller's `Host`, and without TLS behind a proxy
            lifespan=self._lifespan,
            responses=problems.RESPONSES,
            telemetry={"tracing": False, "metrics": False, "logs": False},
        )
        problems.install(app)
        app.add_middleware(ShortWay, submit=self.submit, require_key=self._require_key)
        app.add_middleware(LimitedBodies, require_key=self._require_key, idle_s=self._settings.upload_idle_s)
        app.add_middleware(MeasuredCalls, store=self._store, refusals=self._refusals)
        v1 = APIRouter(prefix="/v1", dependencies=[Depends(self._require_key)])
        v1.add_api_route("/models", self.list_models)
        v1.add_api_route("/models/{name}", self.describe)
        v1.add_api_route("/models/{name}", self.deploy, methods=["PUT"], status_code=202)
        v1.add_api_route("/models/{name}", self.resize, methods=["PATCH"], status_code=202)
        v1.add_api_route("/models/{name}", self.remove, methods=["DELETE"], status_code=202)
        v1.add_api_route("/models/{name}/drain", self.drain, methods=["POST"], status_code=202)
        v1.add_api_route("/models/{name}/tokenizer", self.tokenizer)
        v1.add_api_route("/models/{name}/validate", self.validate, methods=["POST"])
        v1.add_api_route("/models/{name}/sites", self.sites, methods=["POST"])
        v1.add_api_route("/models/{name}/requests", self.submit, methods=["POST"])
        v1.add_api_route("/models/{name}/requests", self.take_back, methods=["DELETE"])
        RequestRoutes(self._store, _plain).add_to(v1)
        v1.add_api_route("/requests/{request_id}", self.status)
        v1.add_api_route("/requests/{request_id}", self.cancel, methods=["DELETE"])
        v1.add_api_route("/requests/{request_id}/result", self.result, methods=["GET"])
        v1.add_api_route("/requests/{request_id}/result", self.result, methods=["HEAD"], include_in_schema=False)
        self._events.add_to(v1)
        self._edits.add_to(v1)
        UsageRoutes(self._store, self._admission).add_to(v1)
        ModelRoutes(self._store).add_to(v1)
        self._keeping.add_to(v1)
        self._keys.add_to(v1)
        self._tenants.add_to(v1)
        PurgeRoutes(self._store).add_to(v1)
        DrainRoutes(self._store).add_to(v1)
        app.include_router(v1)
        openai = APIRouter(prefix="/v1", route_class=openai_route(self._require_key, self._settings.upload_idle_s))
        self._openai.add_to(openai)
        app.include_router(openai)
        metrics = APIRouter(dependencies=[Depends(self._require_key)])
        MetricRoutes(self._store).add_to(metrics)
        app.include_router(metrics)
        app.add_api_route("/healthz", self.healthz)
        app.add_api_route("/readyz", self.readyz)
        describe(app)
        return app

    def release(self) -> None:
        """Ends every wait now, so that the process can stop: waiting submits get 202 and go on in the store."""
        self._waiting.release()

    # --- routes

    async def healthz(self) -> dict[str, str]:
        """The gateway runs; nothing is said of the deployments."""
        return {"status": "ok"}

    async def readyz(self, request: Request, model: str | None = None) -> dict[str, str]:
        """A deployment, or the named one, is loaded, self-tested and takes requests, and these can be stored.

        Why not is told to operators and monitors.
        """
        reason = await self._readiness.lacking() or self._deployments.not_ready(model)
        if reason is None and self._store.draining.now() is None:
            return {"status": "ready"}
        told = "what was asked for takes no requests now"
        with contextlib.suppress(PolytraceError):
            caller = await self._access.identify(request.headers.get("authorization", ""))
            told = (reason or "the service is drained, or stopping") if caller.sees_figures else told
        raise CapacityError(told)

    async def list_models(self, request: Request) -> dict[str, Any]:
        """The deployments that the caller may use: what they are, how far, how many requests wait and run, and how each
        replica does.

        `data` has the names of those that are ready, as OpenAI's clients read them. `is_draining`: none of them takes
        requests now, because the whole service is drained or stops.
        """
        counts = await to_thread.run_sync(self._store.open_requests)
        models = []
        for known in await to_thread.run_sync(self._store.deployments):
            if not caller_of(request).may_use(known.model):
                continue
            served = self._deployments.find(known)
            count = counts.get(known.model, {})
            entry = _entry(known) | {
                "is_ready": served is not None and known.mode is Mode.SERVING,
                "queued": count.get(RequestState.QUEUED, 0),
                "running": count.get(RequestState.RUNNING, 0),
            }
            models.append(entry | (_facts(served) if served else {}))
        ready = [
            {"id": known["name"], "object": "model", "created": 0, "owned_by": "polytrace"}
            for known in models
            if known["is_ready"]
        ]
        is_draining = self._store.draining.now() is not None
        return {"models": models, "object": "list", "data": ready, "is_draining": is_draining}

    async def deploy(self, name: str, wish: Deploy, request: Request) -> dict[str, Any]:
        """Serves a model under this name from now on, or again when it was drained or has failed. For operators."""
        operator_of(request)
        spec = checked_spec(DeploymentSpec(name=name, **wish.model_dump()))
        return await self._operated(request, name, partial(self._store.want, spec), wish.model_dump())

    async def resize(self, name: str, wish: Resize, request: Request) -> dict[str, Any]:
        """Another number of replicas. New ones load while the others serve; one that goes finishes what it has. For
        operators.
        """
        resize = partial(self._store.resize, name, wish.replicas)
        return await self._operated(request, name, resize, wish.model_dump())

    async def drain(self, name: str, request: Request) -> dict[str, Any]:
        """Takes no new requests, finishes those that wait and run, and keeps its shards. For operators."""
        return await self._operated(request, name, partial(self._store.drain, name))

    async def remove(self, name: str, request: Request, now: bool = False) -> dict[str, Any]:
        """Drains it and ends its shards; `now`: at once, and what has not finished is refused. For operators."""
        return await self._operated(request, name, partial(self._store.remove, name, now=now), {"now": now})

    async def describe(self, name: str, request: Request) -> Response:
        """The model description: module tree, sites, parameters, limits."""
        served = self._deployments.get(name, caller_of(request))
        headers = {"ETag": f'"{served.version}"', "Vary": "Accept-Encoding", "Cache-Control": "private, no-cache"}
        headers |= version_headers()
        if served.version in re.findall(r'"([^"]*)"', request.headers.get("if-none-match", "")):
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(served.zipped, media_type="application/json", headers=headers)
        return Response(served.body, media_type="application/json", headers=headers)

    async def tokenizer(self, name: str, request: Request) -> Response:
        """The model's tokenizer.json."""
        served = self._deployments.get(name, caller_of(request))
        if served.tokenizer is None:
            raise NotFoundError(f"{name} came without a tokenizer; send token ids")
        return Response(served.tokenizer, media_type="application/json")

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
            self._store.discard(request_id)
        return Response(certificate, media_type="application/json")

    async def sites(self, name: str, request: Request) -> Response:
        """What a call visits, of a model that is called as it is. Nothing runs, nothing is kept."""
        served = self._deployments.get(name, caller_of(request))
        await self._admission.ask(caller_of(request), name)
        try:
            asked = await request.body()  # at most MAX_QUESTION_BYTES (`api.bodies`)
        except ClientDisconnect:
            return problems.left()
        answer = await self._checker.sites(name, served.version, asked)
        if answer.error is not None:
            raise from_fields(answer.error)
        return Response(answer.body, media_type="application/json")

    async def submit(self, name: str, request: Request) -> Response:
        """Checks and accepts a request. Answers with its result, or 202 when the caller does not wait long enough."""
        caller, key = caller_of(request), key_of(request)
        is_waited_for = is_interactive(request, self._preferred_wait(request))
        if key is not None and (before := await self._submitted(key, name, request)) is not None:
            return await self._followed(before, request)
        served = self._deployments.taking(name, caller)
        terms = await self._admission.begin(caller, name)
        request_id = self._store.new_id()
        about_call(request=request_id)
        # who waits is told nothing before the end, which is durable; or else what `_answer` secures first
        is_kept = self._preferred_wait(request) <= 0 or self._store.objects is not None
        try:
            await self._receive(request_id, request, served, terms)
            checked = self._admission.checked(request_id, served, caller, terms)
            if is_kept:
                verdict, _ = await asyncio.gather(checked, to_thread.run_sync(self._store.sync_request, request_id))
            else:
                verdict = await checked
        except ClientDisconnect:
            self._store.discard(request_id)
            return problems.left()
        except BaseException:
            self._store.discard(request_id)
            raise
        expected = self._waiting.expect(request_id)
        try:
            status = await self._accepted(request_id, served, request, terms, verdict, is_waited_for, is_kept)
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
            return await self.cancel(known[0], request)
        self._deployments.get(name, caller_of(request))
        return JSONResponse({"id": None})

    async def status(
        self,
        request_id: str,
        request: Request,
        wait: Annotated[float, Query(ge=0)] = 0.0,
        passes_done: Annotated[int | None, Query(ge=0)] = None,
    ) -> Response:
        """How a request does; with `wait`, once it has ended, more than `passes_done` are, or the seconds are over.

        While its deployment is loaded a wait is shorter, and `waits_for` says how far that is.
        """
        wait_s, caller = min(wait, self._settings.max_wait_s), caller_of(request)
        if wait_s > LOADING_S and self._deployments.are_loading:
            before = await self._waiting.until_final(RequestId(request_id), 0.0, caller)
            if before.state is RequestState.QUEUED and self._deployments.waits_for(before.model) is not None:
                wait_s = LOADING_S
        status = await self._waiting.until_final(RequestId(request_id), wait_s, caller, passes_done=passes_done)
        return JSONResponse(await self._stands(status) | {"logs": logs_since(status.logs, passes_done or 0)})

    async def result(self, request_id: str, request: Request) -> Response:
        """The result file of a finished request; 202 and the status while there is none."""
        status = await self._waiting.until_final(RequestId(request_id), 0.0, caller_of(request))
        return await self._answer(status, is_whole=False)

    async def cancel(self, request_id: str, request: Request) -> Response:
        """Cancels a request that has not ended; says how it stands then."""
        await self._waiting.until_final(RequestId(request_id), 0.0, caller_of(request))  # NotFoundError
        status = await to_thread.run_sync(self._store.cancel, RequestId(request_id))
        if status is None:
            raise no_request(request_id)
        return JSONResponse(_plain(status))

    # --- inside

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        bell = self._store.gateway_bell
        events_bell = self._store.events_bell
        loop.add_reader(bell.listen(), self._on_bell)
        loop.add_reader(events_bell.listen(), self._on_events_bell)
        self._deployments.ring()
        self._checker.start()
        with contextlib.suppress(AwayError):  # else each is secured when somebody is told of it
            await to_thread.run_sync(self._store.keep_open)
        with contextlib.suppress(AwayError):  # their room is given back another time
            self._store.contents.give_up_uploads()
        purging = asyncio.create_task(self._keeping.purge_forever())
        expiring = asyncio.create_task(self._expiry.run_forever())
        noting = asyncio.create_task(self._access.note_forever())
        refusing = asyncio.create_task(self._refusals.write_forever())
        try:
            yield
        finally:
            purging.cancel()
            expiring.cancel()
            noting.cancel()
            refusing.cancel()
            self._refusals.write()
            loop.remove_reader(bell.listen())
            loop.remove_reader(events_bell.listen())
            self._checker.close()

    def _on_bell(self) -> None:
        self._store.gateway_bell.quiet()
        self._waiting.ring()
        self._deployments.ring()

    def _on_events_bell(self) -> None:
        self._store.events_bell.quiet()
        self._streams.ring()

    def _tenants_changed(self) -> None:
        """Who comes in, and what limits hold, is looked up again."""
        self._access.forget()
        self._admission.forget()

    async def _require_key(self, request: Request) -> None:
        caller = await self._access.identify(request.headers.get("authorization", ""))
        request.state.caller = caller
        about_call(tenant=caller.tenant, user=caller.user)
        check_role(caller, request.method, request.url.path)

    async def _operated(
        self, request: Request, name: str, act: Callable[[], Deployment], details: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """An act of an operator's on a deployment, and that it was done."""
        operator = operator_of(request)
        entry = _entry(await to_thread.run_sync(act))
        word = {"PUT": "deploy", "PATCH": "resize", "POST": "drain", "DELETE": "remove"}[request.method]
        await to_thread.run_sync(partial(self._store.audit.record, operator, f"models.{word}", name, **details))
        return entry

    async def _accepted(
        self,
        request_id: RequestId,
        served: Served,
        request: Request,
        terms: Terms,
        verdict: Verdict,
        is_waited_for: bool,
        is_kept: bool,
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
                is_kept=is_kept,
            )
        except PolytraceError as error:
            if not (isinstance(error, AwayError) and error.may_be_done):  # else a sweep sees whether it was accepted
                self._store.discard(request_id)
            raise
        except AcceptedBeforeError as before:
            self._store.discard(request_id)
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
        if (wait_s := self._preferred_wait(request)) <= 0:
            return await self._answer(status)
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
        return problems.left() if waited is None else await self._answer(waited)

    def _preferred_wait(self, request: Request) -> float:
        """Seconds of `Prefer: wait=N` (RFC 7240), at most what the settings allow; 0 when there is none."""
        found = re.search(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,9}(?:\.\d+)?)', request.headers.get("prefer", ""))
        return min(float(found[1]), self._settings.max_wait_s) if found else 0.0

    async def _answer(self, status: RequestStatus, *, is_whole: bool = True) -> Response:
        """The result of a finished request, the problem of a failed one, else 202 with the status.

        `is_whole`: nobody can have asked for a part of the result, so a small one needs no machinery for that.
        """
        headers: dict[str, str] = {"X-Request-Id": status.id}
        if status.state.is_final:
            self._store.has_ended(status.id)
        if status.state is RequestState.DONE and isinstance(self._store.results, ObjectResults):
            stored = await to_thread.run_sync(self._store.results.stored, status.id)
            return StoredResultResponse(stored, MEDIA_TYPE, headers)
        if status.state is RequestState.DONE and is_whole and status.result is not None:
            return Response(status.result, media_type=MEDIA_TYPE, headers=headers)
        if status.state is RequestState.DONE:
            path = self._store.result_path(status.id)
            if is_whole and (content := await to_thread.run_sync(_read_small, path)) is not None:
                return Response(content, media_type=MEDIA_TYPE, headers=headers)
            return StoredFile(path, media_type=MEDIA_TYPE, headers=headers)
        if status.error is not None:
            return problems.problem(status.error, headers)
        headers["Location"] = f"/v1/requests/{status.id}"
        await to_thread.run_sync(self._store.secure, status.id)
        return JSONResponse(await self._stands(status), status_code=202, headers=headers)

    async def _stands(self, status: RequestStatus) -> dict[str, Any]:
        """The status, with the place of one that waits."""
        if status.state is not RequestState.QUEUED:
            return _plain(status)
        plain = _plain(status, await to_thread.run_sync(self._store.queue_outlook, status.id))
        return plain | {"waits_for": self._deployments.waits_for(status.model)}


def _read_small(path: Path) -> bytes | None:
    """A file in one go; None when it is too large for that."""
    with path.open("rb", buffering=0) as file:
        content = file.read(SMALL_BYTES + 1)
    return content if len(content) <= SMALL_BYTES else None


Count = Annotated[int, Field(strict=True, gt=-(1 << 62), lt=1 << 62)]  # how few there may be, `checked_spec` says


class Deploy(BaseModel):
    """What is to be served. The name is in the path."""

    model_config = ConfigDict(extra="forbid")

    source: str
    stages: Count = 1
    ranks: Count = 1
    replicas: Count = 1
    dtype: str = "auto"
    device: str = "auto"
    cpus: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    random_weights_seed: Count | None = None
    offload_bytes: Count = 0
    share_across: ShareAcross = ShareAcross.TENANT
    merges_calls: bool = False
    whole: bool = True
    device_map: str | dict[str, StrictInt | str] | None = None
    gpus: Count | None = None


class Resize(BaseModel):
    """How many replicas there are to be."""

    model_config = ConfigDict(extra="forbid")

    replicas: Annotated[int, Field(strict=True, ge=1, le=MAX_REPLICAS)]


def _entry(known: Deployment) -> dict[str, Any]:
    return {
        "name": known.model,
        "state": known.state.value,
        "mode": known.mode.value,
        "progress": known.progress,
        "spec": None if known.spec is None else to_json(known.spec),
        "replicas": to_json(known.replicas),
        "heat": known.heat.value,
        "keeping": to_json(known.keeping),
        "last_used": known.last_used,
    }


def _facts(served: Served) -> dict[str, Any]:
    about = served.description
    return {
        "class_name": about.class_name,
        "dtype": about.dtype,
        "num_layers": about.num_layers,
        "stages": about.stages,
        "ranks": about.ranks,
        "fingerprint": about.fingerprint,
    }


def _plain(status: RequestStatus, outlook: Outlook | None = None) -> dict[str, Any]:
    return {
        "id": status.id,
        "model": status.model,
        "tenant": status.tenant,
        "user": status.user,
        "state": status.state.value,
        "created": status.created,
        "started": status.started,
        "finished": status.finished,
        "passes_done": status.passes_done,
        "passes": status.passes,
        "queue_position": None if outlook is None else outlook.queue_position,
        "expected_start": None if outlook is None else outlook.expected_start,
        "waits_for": None,
        "error": status.error.to_fields() if status.error else None,
        "result": f"/v1/requests/{status.id}/result" if status.state is RequestState.DONE else None,
        "token_layers": status.token_layers,
        "moved_bytes": status.moved_bytes,
        "result_bytes": status.result_bytes,
    }
