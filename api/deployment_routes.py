"""The routes of deployments: which there are and what they serve, and, for operators, which there are to be.

How long one stays loaded is `api.heat_routes`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api import problems
from api.admission import Admission
from api.callers import caller_of, operator_of
from api.catalogue import Deployment
from api.served import Checker, Deployments, Served
from api.settings import MAX_REPLICAS, checked_spec
from api.status import RequestState
from api.store import Store
from cluster.config import DeploymentSpec, Mode, ShareAcross
from polytrace.codec import to_json
from polytrace.errors import NotFoundError, from_fields
from polytrace.versions import version_headers


class DeploymentRoutes:
    """Has no state of its own."""

    def __init__(self, store: Store, checker: Checker, deployments: Deployments, admission: Admission) -> None:
        self._store = store
        self._checker = checker
        self._deployments = deployments
        self._admission = admission

    def add_to(self, router: APIRouter) -> None:
        router.add_api_route("/models", self.list_models)
        router.add_api_route("/models/{name}", self.describe)
        router.add_api_route("/models/{name}", self.deploy, methods=["PUT"], status_code=202)
        router.add_api_route("/models/{name}", self.resize, methods=["PATCH"], status_code=202)
        router.add_api_route("/models/{name}", self.remove, methods=["DELETE"], status_code=202)
        router.add_api_route("/models/{name}/drain", self.drain, methods=["POST"], status_code=202)
        router.add_api_route("/models/{name}/drain", self.resume, methods=["DELETE"], status_code=202)
        router.add_api_route("/models/{name}/tokenizer", self.tokenizer)
        router.add_api_route("/models/{name}/sites", self.sites, methods=["POST"])

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

    async def deploy(self, name: str, wish: Deploy, request: Request) -> dict[str, Any]:
        """Serves a model under this name from now on, or again when it was drained or has failed. For operators."""
        operator_of(request)
        spec = checked_spec(DeploymentSpec(name=name, **wish.model_dump()))
        return await self._operated(request, "deploy", name, partial(self._store.want, spec), wish.model_dump())

    async def resize(self, name: str, wish: Resize, request: Request) -> dict[str, Any]:
        """Another number of replicas. New ones load while the others serve; one that goes finishes what it has. For
        operators.
        """
        resize = partial(self._store.resize, name, wish.replicas)
        return await self._operated(request, "resize", name, resize, wish.model_dump())

    async def drain(self, name: str, request: Request) -> dict[str, Any]:
        """Takes no new requests, finishes those that wait and run, and keeps its shards. For operators."""
        return await self._operated(request, "drain", name, partial(self._store.drain, name))

    async def resume(self, name: str, request: Request) -> dict[str, Any]:
        """Takes requests again when it was drained, with the shards that it has. For operators."""
        return await self._operated(request, "resume", name, partial(self._store.resume, name))

    async def remove(self, name: str, request: Request, now: bool = False) -> dict[str, Any]:
        """Drains it and ends its shards; `now`: at once, and what has not finished is refused. For operators."""
        return await self._operated(request, "remove", name, partial(self._store.remove, name, now=now), {"now": now})

    async def _operated(
        self, request: Request, word: str, name: str, act: Callable[[], Deployment], details: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """An act of an operator's on a deployment, and that it was done, under its word in the audit log."""
        operator = operator_of(request)
        entry = _entry(await to_thread.run_sync(act))
        await to_thread.run_sync(partial(self._store.audit.record, operator, f"models.{word}", name, **details))
        return entry


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
    merges_calls: bool = True
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
        "is_described": known.is_described,
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
