"""The HTTP gateway: takes requests, tells how they do, and sends results. A process of its own that never touches Ray.

Owns what the routes share, and who may come in; the routes are in files of their own (`api.submit_routes`,
`api.request_routes`, `api.deployment_routes` and others). Requests are checked by `api.worker`, kept by `api.store` and
run by the controller; bodies stream between socket and file, 4 MB at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from anyio import to_thread
from fastapi import APIRouter, Depends, FastAPI
from starlette.requests import Request

from api import problems
from api.access import Access
from api.admission import Admission
from api.answers import Answers
from api.away import AwayError
from api.bodies import LimitedBodies
from api.callers import check_role
from api.content_routes import ContentRoutes
from api.deployment_routes import DeploymentRoutes
from api.document import describe
from api.drain_routes import DrainRoutes
from api.edit_routes import EditRoutes
from api.event_routes import EventRoutes, cancel_soon
from api.expiry import Expiry
from api.heat_routes import HeatRoutes
from api.idempotency import Returning
from api.key_routes import KeyRoutes
from api.log_lines import about_call
from api.metric_routes import MeasuredCalls, MetricRoutes
from api.oidc import Provider
from api.openai_errors import openai_route
from api.openai_routes import OpenAIRoutes
from api.purge_routes import PurgeRoutes
from api.readiness import Readiness
from api.refusals import Refusals
from api.request_routes import RequestRoutes
from api.served import Checker, Deployments
from api.settings import GatewaySettings
from api.short_way import ShortWay
from api.store import Store
from api.streams import Streams
from api.submit_routes import SubmitRoutes
from api.tenant_routes import TenantRoutes
from api.usage_routes import UsageRoutes
from api.waiting import Waiting
from polytrace.errors import CapacityError, PolytraceError


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
        answers = Answers(store, self._deployments)
        self._models = DeploymentRoutes(store, checker, self._deployments, self._admission)
        self._requests = RequestRoutes(store, settings, self._deployments, self._waiting, answers)
        self._submits = SubmitRoutes(
            store,
            settings,
            self._deployments,
            self._admission,
            self._waiting,
            self._returning,
            answers,
            self._requests.cancel,
        )
        self._events = EventRoutes(store, self._waiting, self._streams, self._deployments)
        self._openai = OpenAIRoutes(
            store, checker, self._deployments, self._waiting, self._streams, self._admission, self._returning
        )
        self._contents = ContentRoutes(store.contents, self._admission, upload_idle_s=settings.upload_idle_s)

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
        app.add_middleware(ShortWay, submit=self._submits.submit, require_key=self._require_key)
        app.add_middleware(LimitedBodies, require_key=self._require_key, idle_s=self._settings.upload_idle_s)
        app.add_middleware(MeasuredCalls, store=self._store, refusals=self._refusals)
        v1 = APIRouter(prefix="/v1", dependencies=[Depends(self._require_key)])
        self._models.add_to(v1)
        self._submits.add_to(v1)
        self._requests.add_to(v1)
        self._events.add_to(v1)
        self._edits.add_to(v1)
        UsageRoutes(self._store, self._admission).add_to(v1)
        HeatRoutes(self._store).add_to(v1)
        self._contents.add_to(v1)
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
            await to_thread.run_sync(self._store.received.secure_open)
        with contextlib.suppress(AwayError):  # their room is given back another time
            self._store.contents.give_up_uploads()
        purging = asyncio.create_task(self._contents.purge_forever())
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
