"""`polytrace doctor`: whether this machine can serve, and whether a service does; each finding with what to do next.

A check looks at one thing and never changes any. What it cannot find out is a warning, not a failure.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from api.service_calls import Service
from polytrace.errors import ForbiddenError, KeyRefusedError, PolytraceError

_GIB = 1 << 30
_MIN_FREE_BYTES = 10 * _GIB  # where results go
_MIN_SHARED_BYTES = 512 << 20  # of /dev/shm: what Ray's object store and the shards' channels take
_MIN_FILES = 4096  # open at once: a connection each
_MAX_SKEW_S = 60.0  # of clocks; keys and tokens expire by them
_NEEDED = ("torch", "transformers", "ray", "fastapi", "uvicorn", "safetensors", "alembic", "prometheus-client")


class Grade(Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, in one line; `next_step` is empty where nothing is to be done."""

    grade: Grade
    what: str
    told: str
    next_step: str = ""


def machine_findings(store: Path) -> Iterator[Finding]:
    """Of this machine, for a service with its store in this folder."""
    yield Finding(Grade.OK, "python", ".".join(map(str, sys.version_info[:3])))
    yield from _packages()
    yield _disk(store)
    yield _shared_memory(Path("/dev/shm"))
    yield _open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield _gpus()


def service_findings(service: Service, url: str) -> Iterator[Finding]:
    """Of a running service: nothing more once one says that the others would be noise."""
    from polytrace.http_calls import told_url

    url = told_url(url)
    try:
        told = service.headers("/healthz")
    except PolytraceError as error:
        yield Finding(Grade.FAIL, "gateway", str(error), f"start one: polytrace serve MODEL; or is {url} another's?")
        return
    yield Finding(Grade.OK, "gateway", f"{url} answers")
    yield _clock(told.get("date"))
    try:
        deployments = service.deployments()
    except (KeyRefusedError, ForbiddenError) as error:
        yield Finding(Grade.FAIL, "key", str(error), "polytrace keys make --store FOLDER --operator, on its machine")
        return
    except PolytraceError as error:
        yield Finding(Grade.FAIL, "models", str(error), "look into gateway.log in the store's folder")
        return
    yield Finding(Grade.OK, "key", "it is good")
    yield from _ready(service)
    if not deployments:
        yield Finding(Grade.WARN, "models", "there are none", "polytrace deploy MODEL")
    for one in deployments:
        yield _deployment(one["name"], one["state"], one["mode"], one["progress"])
    yield _figures(service)


# --- the machine


def _packages() -> Iterator[Finding]:
    found: list[str] = []
    for name in _NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding(Grade.FAIL, "packages", f"{name} is not installed", "pip install 'polytrace[all]'")
    yield Finding(Grade.OK, "packages", ", ".join(found))


def _disk(store: Path) -> Finding:
    place = next(one for one in (store.resolve(), *store.resolve().parents) if one.exists())
    free = shutil.disk_usage(place).free
    told = f"{free / _GIB:.1f} GiB are free at {place}"
    if not os.access(place, os.W_OK):
        return Finding(Grade.FAIL, "disk", f"{place} cannot be written", "choose another --store, or its owner")
    if free < _MIN_FREE_BYTES:
        need = f"results and uploads want {_MIN_FREE_BYTES // _GIB} GiB"
        return Finding(Grade.WARN, "disk", told, f"{need}: choose another --store, or make room")
    return Finding(Grade.OK, "disk", told)


def _shared_memory(place: Path) -> Finding:
    if not place.is_dir():
        return Finding(Grade.WARN, "shared memory", f"there is no {place}", "shards talk through slower files then")
    free = shutil.disk_usage(place).free
    told = f"{free / _GIB:.1f} GiB are free at {place}"
    if free < _MIN_SHARED_BYTES:
        return Finding(Grade.FAIL, "shared memory", told, "in a container: --shm-size=2g")
    return Finding(Grade.OK, "shared memory", told)


def _open_files(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY or limit >= _MIN_FILES:
        return Finding(Grade.OK, "open files", "no limit" if limit == resource.RLIM_INFINITY else str(limit))
    return Finding(Grade.WARN, "open files", f"at most {limit}", f"ulimit -n {_MIN_FILES}: each connection is one")


def _gpus() -> Finding:
    try:
        import torch
    except ImportError:  # told by the packages
        return Finding(Grade.WARN, "gpus", "nobody can look without torch", "")
    count = torch.cuda.device_count()
    if count == 0:
        return Finding(Grade.WARN, "gpus", "none: models run on the CPU", "nvidia-smi says whether the machine has any")
    names = {torch.cuda.get_device_name(number) for number in range(count)}
    return Finding(Grade.OK, "gpus", f"{count} x {', '.join(sorted(names))}")


# --- the service


def _clock(date: str | None) -> Finding:
    from email.utils import parsedate_to_datetime

    if date is None:
        return Finding(Grade.WARN, "clocks", "the service tells no time", "something between alters its answers")
    skew = parsedate_to_datetime(date).timestamp() - time.time()
    if abs(skew) > _MAX_SKEW_S:
        return Finding(
            Grade.WARN, "clocks", f"the service's is {skew:+.0f} s off this machine's", "let NTP run on both"
        )
    return Finding(Grade.OK, "clocks", "this machine's and the service's agree")


def _ready(service: Service) -> Iterator[Finding]:
    try:
        service.ask("GET", "/readyz")
        yield Finding(Grade.OK, "ready", "it takes requests")
    except PolytraceError as error:
        yield Finding(Grade.FAIL, "ready", str(error), 'polytrace status; operating.md, "When an alert fires"')


def _deployment(name: str, state: str, mode: str, progress: str) -> Finding:
    what, told = f"model {name}", progress.strip().partition("\n")[0]
    if state == "failed":
        return Finding(Grade.FAIL, what, f"failed: {told}", "controller.log has all of it; mend it and deploy it again")
    if mode != "serving":
        is_drained = mode == "draining"
        step = f"polytrace resume {name} lets it take requests again" if is_drained else "polytrace status follows it"
        return Finding(Grade.WARN, what, f"is {mode}, {state}: {told}", step)
    if state == "ready":
        return Finding(Grade.OK, what, "ready")
    if state in ("warm", "cold"):
        return Finding(Grade.OK, what, f"rests, {state}: {told}")
    return Finding(Grade.WARN, what, f"{state}: {told}", "polytrace status follows it")


def _figures(service: Service) -> Finding:
    try:
        service.text("/metrics")
    except ForbiddenError:
        return Finding(Grade.WARN, "metrics", "this key is a user's", "an operator's key sees them")
    except PolytraceError as error:
        return Finding(Grade.FAIL, "metrics", str(error), "look into gateway.log in the store's folder")
    return Finding(Grade.OK, "metrics", "/metrics answers")


def worst(findings: list[Finding]) -> Grade:
    """The grade of all together."""
    grades = list(Grade)
    return max((one.grade for one in findings), key=grades.index)
