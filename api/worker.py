"""Checks requests in processes of their own, so that the gateway holds no torch and stays quick.

A worker has the model without weights (on the meta device) and says of a stored file whether its request can be
honoured: decoding, shapes, placement, limits. An error is a value in the answer. A worker that dies takes nobody with
it: the requests it had are checked once more, each in a process of its own, and the one that ends that process too is
refused.

Nothing at the top of this module may import torch: the gateway imports it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from api import log_lines
from api.limits import NO_DEMAND, Demand, demand_of
from api.needs import NOTHING, Needs, needs_of
from api.time_limits import within
from polytrace.errors import (
    GraphError,
    MissingError,
    PolytraceError,
    ServiceError,
    WireError,
    from_fields,
)

if TYPE_CHECKING:
    from torch import nn

    from api.checked_calls import CheckedCalls
    from api.wishes import ChatWish, CompletionWish
    from cluster.requests import Published
    from polytrace.certificate import Certificate
    from polytrace.description import ModelDescription
    from polytrace.graph import Request
    from scheduling.plan import Program

T = TypeVar("T")
LARGE_NODES = 5_000  # of graphs that are checked apart, one after another: each takes a second or a hundred
LONGEST_S = 300.0  # of one check
NEAREST_S = 20.0  # of a search for what would fit, which ends itself between two tries
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a worker found out about one request. One of `error` and `facts` is set; of edits no facts."""

    facts: bytes | None = None  # JSON for the controller: per node its ValueFacts or null
    needs: Needs = NOTHING  # of its owner's contents
    work: int = 0  # rows x layers that it would run through
    demand: Demand = NO_DEMAND  # what admission holds against limits
    certificate: bytes | None = None  # JSON for the user, to which admission adds; only when it was asked for
    is_large: bool = False  # it was only read: it is to be checked apart
    holds_alike: bool = False  # for every request that is like it (`cluster.likeness`) too
    error: Mapping[str, str] | None = None  # PolytraceError.to_fields()

    def raise_error(self) -> None:
        """Raises what is wrong with the request, if anything is."""
        if self.error is not None:
            raise from_fields(self.error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a worker says of a question. One of both is set."""

    body: bytes | None = None  # JSON
    error: Mapping[str, str] | None = None  # PolytraceError.to_fields()


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A request that a worker made of what an OpenAI client asked for, and put where an uploaded one would be."""

    verdict: Verdict
    prompts: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # invokes that go on -> their token ids
    param: str | None = None  # the field that the verdict's error is about


class CheckerPool:
    """The gateway's side: a pool of workers. Construction starts none. `max_text_chars`: as of `api.composing`."""

    def __init__(self, store: Path, workers: int, *, max_text_chars: int | None = None) -> None:
        self._store = store
        self._max_text_chars = max_text_chars
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._careful: ProcessPoolExecutor | None = None  # one process that checks one request at a time
        self._careful_turn = asyncio.Lock()
        self._large: deque[Path] = deque(maxlen=256)  # requests that were checked apart

    def start(self) -> None:
        """Starts what the workers do only once, which takes seconds, while the deployment still loads."""
        if self._pool is None:
            self._pool = self._make_pool(self._workers)
        for _ in range(self._workers):
            self._pool.submit(_warm)

    async def warm(self, model: str, version: str) -> None:
        """Gets every worker ready for a deployment, so that no user waits for it."""
        await asyncio.gather(*(self._run(_prepare, model, version) for _ in range(self._workers)))

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        """What is to be said of the request in a file, whose owner has `contents`.

        `version` names the description that it is checked against.
        """
        about = model, version, str(path), str(contents), certify
        verdict = await self._run(_check, *about, LARGE_NODES)
        if not verdict.is_large:
            return verdict
        self._large.append(path)
        return await self._apart(_check, *about)

    async def compose(
        self, model: str, version: str, path: Path, wish: CompletionWish | ChatWish, *, contents: Path
    ) -> Composed:
        """Makes the request that a wish is, as a new file, and says of it what `check` would."""
        return await self._run(_compose, model, version, str(path), str(contents), wish)

    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None:
        """The nearest request to the one in a file that keeps these limits, in words; None where nobody knows one.

        `most`: by the names of `Demand`, and `stored_bytes`.
        """
        run = self._apart if path in self._large else self._run
        return await run(_nearest, model, version, str(path), str(contents), dict(most))

    async def sites(self, model: str, version: str, asked: bytes) -> Answer:
        """What a call visits, by the arguments that a question names."""
        return await self._run(_sites, model, version, asked)

    async def check_edits(self, model: str, version: str, path: Path) -> Verdict:
        """What is to be said of the edits in a file: whether they are any, and of this model."""
        return await self._run(_check_edits, model, version, str(path))

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        for pool in (self._pool, self._careful):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)
        self._pool = self._careful = None
        for child in multiprocessing.active_children():
            child.kill()

    async def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        if self._pool is None:
            self._pool = self._make_pool(self._workers)
        pool = self._pool
        try:
            return await loop.run_in_executor(pool, function, *arguments)
        except BrokenProcessPool:
            if self._pool is pool:  # the first to notice
                self._pool = None
        _log.warning("a checking process ended; its requests are checked once more, each alone")
        return await self._apart(function, *arguments)

    async def _apart(self, function: Callable[..., T], *arguments: Any) -> T:
        """In a process of its own, that does one thing at a time: nobody else waits for it, or ends with it."""
        loop = asyncio.get_running_loop()
        async with self._careful_turn:
            if self._careful is None:
                self._careful = self._make_pool(1)
            try:
                return await loop.run_in_executor(self._careful, function, *arguments)
            except BrokenProcessPool:
                self._careful = None
                raise ServiceError("checking the request ended the process that did it; it is refused") from None

    def _make_pool(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(str(self._store), self._max_text_chars),
        )


class _Worker:
    """The state of a worker process: the model it has at hand."""

    def __init__(self, store: Path, max_text_chars: int | None) -> None:
        self._store = store
        self.max_text_chars = max_text_chars
        self._loaded: dict[str, tuple[str, ModelDescription, nn.Module]] = {}
        self._tokenizers: dict[str, tuple[str, Any]] = {}
        self.calls: dict[str, CheckedCalls] = {}  # of models that are called as they are

    def load(self, model: str, version: str) -> tuple[ModelDescription, nn.Module]:
        if model in self._loaded and self._loaded[model][0] == version:
            return self._loaded[model][1:]
        from api.checked_calls import CheckedCalls
        from engine.fetching import here
        from engine.loading import meta_model
        from engine.whole_loading import whole_class, whole_meta
        from polytrace.codec import from_json
        from polytrace.description import ModelDescription, PassLayout

        published = self._published(model)
        source = here(published.source)
        description = from_json(ModelDescription, json.loads(published.description))
        if description.layout is PassLayout.WHOLE:
            meta: nn.Module = whole_meta(source, published.dtype, whole_class(source))
            self.calls[model] = CheckedCalls(meta, description.limits.max_value_bytes, offloaded=description.offloaded)
        else:
            meta = meta_model(source, published.dtype)
            self.calls.pop(model, None)  # of one by this name that was called as it is
        self._loaded[model] = (version, description, meta)
        return self._loaded[model][1:]

    def tokenizer(self, model: str, version: str) -> Any:
        """The model's tokenizer, None without one."""
        if model in self._tokenizers and self._tokenizers[model][0] == version:
            return self._tokenizers[model][1]
        from polytrace.tokenizer import load_tokenizer

        data = self._published(model).tokenizer
        self._tokenizers[model] = (version, None if data is None else load_tokenizer(data))
        return self._tokenizers[model][1]

    def has_tokenizer(self, model: str, version: str) -> bool:
        return self.tokenizer(model, version) is not None

    def _published(self, model: str) -> Published:
        from api.opening import open_store

        store = open_store(self._store)
        published = store.published(model)
        store.close()
        if published is None:
            raise ServiceError(f"{model} has published nothing that requests could be checked against")
        return published


# A pool's tasks find their process' state here; there is no other way to hand it to them.
_worker: _Worker | None = None


def _start(store: str, max_text_chars: int | None) -> None:
    """First thing in a new worker process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's business
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log_lines.configure("checker")
    from polytrace.collector import uncollected

    with uncollected():
        import torch

        import_module("engine.loading")  # for `load`

    torch.set_num_threads(1)
    _worker = _Worker(Path(store), max_text_chars)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _warm() -> None:
    import engine.loading  # noqa: F401  imported to be there
    from engine.shapes import warm_up

    warm_up()


def _prepare(model: str, version: str) -> None:
    from polytrace.collector import settle

    assert _worker is not None
    _worker.load(model, version)
    settle()


def _check(
    model: str, version: str, path: str, contents: str, certify: bool, large_nodes: int | None = None
) -> Verdict:
    def judge(description: ModelDescription, meta: nn.Module) -> Verdict:
        assert _worker is not None
        calls, has_text = _worker.calls.get(model), partial(_worker.has_tokenizer, model, version)
        files = Path(path), Path(contents)
        verdict, request = _verdict(description, meta, *files, certify, has_text, calls, large_nodes)
        return replace(verdict, holds_alike=_looks_at_no_data(request))

    return _answered(model, version, judge)


def _nearest(model: str, version: str, path: str, contents: str, most: Mapping[str, int]) -> str | None:
    from api.nearest import nearest

    found: list[str | None] = []

    def judge(description: ModelDescription, meta: nn.Module) -> Verdict:
        assert _worker is not None
        found.append(nearest(description, meta, Path(path), Path(contents), most, _worker.calls.get(model)))
        return Verdict()

    _answered(model, version, judge, NEAREST_S)
    return found[0] if found else None


def _sites(model: str, version: str, body: bytes) -> Answer:
    from polytrace.codec import to_json
    from polytrace.given_json import asked
    from polytrace.http_sites import CallAnswer

    found: list[bytes] = []

    def judge(description: ModelDescription, meta: nn.Module) -> Verdict:
        assert _worker is not None
        calls = _worker.calls.get(model)
        if calls is None:
            raise GraphError(f"{description.class_name} is asked with prompts: its description has its sites")
        try:
            plain = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise WireError("the question is no JSON") from error
        inputs, tensors = asked(plain)
        sites, has_looked = calls.of(inputs, tensors)
        answer = CallAnswer(sites=sites, has_looked=has_looked)
        found.append(json.dumps(to_json(answer)).encode())
        return Verdict()

    verdict = _answered(model, version, judge)
    return Answer(body=found[0] if found else None, error=verdict.error)


def _compose(model: str, version: str, path: str, contents: str, wish: CompletionWish | ChatWish) -> Composed:
    from api.composing import compose, prompts_of
    from api.wishes import FieldError, WishError
    from polytrace.wire import encode_request

    prompts: dict[int, tuple[int, ...]] = {}
    param: str | None = None

    def judge(description: ModelDescription, meta: nn.Module) -> Verdict:
        nonlocal prompts, param
        assert _worker is not None
        try:
            tokenizer = _worker.tokenizer(model, version)
            request = compose(wish, description, tokenizer, max_text_chars=_worker.max_text_chars)
        except FieldError as found:
            param = found.param
            raise found.error from None
        except WishError as error:
            param = error.param
            raise
        prompts = prompts_of(request)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(encode_request(request))
        has_text = partial(_worker.has_tokenizer, model, version)
        try:
            return _verdict(description, meta, Path(path), Path(contents), False, has_text)[0]
        except (GraphError, MissingError):
            param = None if wish.polytrace is None else "polytrace"
            raise

    verdict = _answered(model, version, judge)
    return Composed(verdict=verdict, prompts=prompts, param=param)


def _check_edits(model: str, version: str, path: str) -> Verdict:
    return _answered(model, version, lambda description, meta: _verdict_of_edits(description, Path(path)))


def _answered(
    model: str, version: str, judge: Callable[[ModelDescription, nn.Module], Verdict], longest_s: float = LONGEST_S
) -> Verdict:
    assert _worker is not None
    try:
        loaded = _worker.load(model, version)
        with within(longest_s, f"checking the request takes longer than {longest_s:g} s; send it in parts"):
            return judge(*loaded)
    except PolytraceError as error:
        return Verdict(error=error.to_fields())
    except Exception as error:  # noqa: BLE001  the edge of the process: record and answer
        _log.exception("checking a request failed")
        return Verdict(error=ServiceError(f"checking the request failed: {type(error).__name__}").to_fields())


def _verdict(
    description: ModelDescription,
    meta: nn.Module,
    path: Path,
    contents: Path,
    certify: bool,
    has_text: Callable[[], bool],
    calls: CheckedCalls | None = None,
    large_nodes: int | None = None,
) -> tuple[Verdict, Request]:
    from cluster.contents import with_contents
    from cluster.facts import FactsRecorder
    from cluster.requests import read_request
    from engine.shapes import infer
    from polytrace.generation import check_stop_texts
    from scheduling.plan import RequestId
    from scheduling.program import certify as make_certificate
    from scheduling.step_saves import all_slots
    from scheduling.whole import described, taped
    from scheduling.working_out import work_out

    request = read_request(path, max_nodes=description.limits.max_nodes)
    if large_nodes is not None and len(request.graph.nodes) > large_nodes:
        return Verdict(is_large=True), request
    check_stop_texts(request.invokes, has_text)
    named = tuple(request.constants.values())
    request, _ = with_contents(request, contents, None)
    if calls is not None:
        of_invokes = calls.of_all(request)
        description = described(description, of_invokes)
    notebook = FactsRecorder(lambda part: infer(description, part, meta), description)
    program, facts = work_out(RequestId(path.stem), request, description, notebook.infer)
    if calls is not None:
        program = taped(program, calls.tape_bytes(program, of_invokes), description.limits)
        notebook.tape_bytes = program.tape_bytes
    _check_keeps(program)
    size = path.stat().st_size
    certificate = make_certificate(program, facts, description, has_values=certify, request_bytes=size)
    verdict = Verdict(
        facts=notebook.encode(request),
        needs=needs_of(named, tuple(all_slots(program))),
        work=certificate.token_layers,
        demand=demand_of(certificate),
        certificate=_as_json(certificate) if certify else None,
    )
    return verdict, request


def _looks_at_no_data(request: Request) -> bool:
    """Whether no shape in it may follow from values."""
    from engine.known import looks_at_data
    from polytrace.graph import Op

    return not any(isinstance(node, Op) and looks_at_data(node) for node in request.graph.nodes)


def _as_json(certificate: Certificate) -> bytes:
    """Without what admission adds."""
    from polytrace.codec import to_json

    plain = to_json(certificate)
    for name in ("limits", "refusal", "retry_after_s"):
        del plain[name]
    return json.dumps(plain).encode()


def _check_keeps(program: Program) -> None:
    """What stays on the service is one value, and one that comes for sure."""
    from scheduling.step_saves import all_slots

    for slot in all_slots(program):
        if slot.keep is not None and slot.is_of_step:
            raise GraphError(f"{slot.keep.name!r} would be a value of each step; keep their stack behind the loop")


def _verdict_of_edits(description: ModelDescription, path: Path) -> Verdict:
    """Sites, parameters and modules are looked up; shapes are checked when a request brings prompts."""
    from polytrace.edits.sets import decode_edits
    from polytrace.graph import Write
    from scheduling.checks import check_nodes, table_of

    edits = decode_edits(path.read_bytes(), path.stem, max_nodes=description.limits.max_nodes)
    check_nodes(edits.nodes, edits.constants, table_of(description))
    return Verdict(work=sum(isinstance(node, Write) for node in edits.nodes))
