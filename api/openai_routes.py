"""`/v1/completions` and `/v1/chat/completions`, as OpenAI's clients speak: the same requests in other words.

What is asked for becomes a request (`api.composing`, in a worker), which is kept and run like any other. Its tokens
come back as text. Who leaves before the end cancels it, because nobody else waits for it; who sent an `Idempotency-Key`
may come again, with the same body, and has the same answer from its beginning (`api.idempotency`).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from api import problems
from api.admission import Admission
from api.away import AwayError
from api.callers import caller_of
from api.choices import Answer
from api.event_routes import cancel_soon
from api.events import TOKEN, Event
from api.idempotency import AcceptedBeforeError, Returning, Submit, check_equal, key_of, submit_of_body
from api.identity import Identity
from api.openai_errors import MODEL, RESPONSES, error_body
from api.served import Checker, Deployments, Served
from api.status import RequestState, RequestStatus
from api.store import Store
from api.streams import COMMENT, MEDIA_TYPE, EventStream, Streams
from api.waiting import Waiting
from api.wishes import ChatWish, CompletionWish, FieldError, about
from api.worker import Composed
from polytrace.certificate import Token
from polytrace.codec import from_json
from polytrace.errors import CapacityError, PolytraceError, ServiceError, from_fields
from polytrace.tokenizer import load_tokenizer
from scheduling.plan import RequestId

_DONE = "data: [DONE]\n\n"
_DOC: dict[int | str, dict[str, Any]] = RESPONSES | {
    200: {
        "description": "As OpenAI answers; with `stream` as server-sent events.",
        "content": {"application/json": {}, MEDIA_TYPE: {"schema": {"type": "string"}}},
    }
}


class OpenAIRoutes:
    """Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        checker: Checker,
        deployments: Deployments,
        waiting: Waiting,
        streams: Streams,
        admission: Admission,
        returning: Returning,
    ) -> None:
        self._store = store
        self._admission = admission
        self._checker = checker
        self._deployments = deployments
        self._waiting = waiting
        self._streams = streams
        self._returning = returning
        self._tokenizers: dict[str, tuple[str, Any]] = {}  # by model, with the version of what it serves
        self._cancelling: set[asyncio.Task[None]] = set()

    def add_to(self, router: APIRouter) -> None:
        for path, answer in (("/completions", self.complete), ("/chat/completions", self.chat)):
            router.add_api_route(path, answer, methods=["POST"], response_class=Response, responses=_DOC)

    async def complete(self, wish: CompletionWish, request: Request) -> Response:
        """Goes on with prompts, as OpenAI's completions do; `polytrace` may say how the model is steered meanwhile."""
        return await self._answered(wish, request)

    async def chat(self, wish: ChatWish, request: Request) -> Response:
        """Answers a conversation in the model's own template, as OpenAI's chat completions do."""
        return await self._answered(wish, request)

    # --- inside

    async def _answered(self, wish: CompletionWish | ChatWish, request: Request) -> Response:
        caller, key = caller_of(request), key_of(request)
        submit = None if key is None else submit_of_body(key, request.url.path, await request.body())
        before = None if submit is None else await self._submitted(submit, caller)
        with about(MODEL):
            find = self._deployments.taking if before is None else self._deployments.get
            served = find(wish.model, caller)
        tokenizer = await self._tokenizer(wish.model, served)
        accepted, composed = await self._accepted(wish, served, caller, submit, before)
        request_id = accepted.id
        answer = Answer(
            wish, request=request_id, created=int(accepted.created), prompts=composed.prompts, tokenizer=tokenizer
        )
        headers = {"X-Request-Id": request_id}
        if submit is not None:
            self._returning.come(request_id)
        if wish.stream:
            left = partial(self._leave, request_id, has_key=submit is not None)
            texts = self._texts(request_id, caller, answer, has_key=submit is not None)
            return EventStream(texts, on_left=left, headers=headers)
        status = None
        try:
            status = await self._waiting.for_caller(accepted, request, math.inf, is_cancelling=submit is None)
        finally:
            if submit is not None:
                self._returning.go(request_id, has_heard=status is not None)
        if status is None:
            return problems.left()
        if (error := _error_of(status)) is not None:
            if submit is None and not status.state.is_final:
                cancel_soon(self._store, request_id, self._cancelling)  # nobody can ask for it again
            raise error
        whole = await to_thread.run_sync(lambda: answer.whole(self._tokens(request_id)))
        return JSONResponse(whole, headers=headers)

    async def _submitted(self, submit: Submit, caller: Identity) -> RequestStatus | None:
        """How the request does that was accepted by this key before, None when there is none."""
        known = await to_thread.run_sync(self._store.submitted, caller.owner, submit.key)
        if known is None:
            return None
        check_equal(known[1], submit)
        return await self._waiting.until_final(known[0], 0.0, caller)

    def _leave(self, request_id: RequestId, *, has_key: bool) -> None:
        """A caller has left its stream: with a key it may come back."""
        if has_key:
            self._returning.go(request_id, has_heard=False)
        else:
            cancel_soon(self._store, request_id, self._cancelling)

    async def _accepted(
        self,
        wish: CompletionWish | ChatWish,
        served: Served,
        caller: Identity,
        submit: Submit | None,
        before: RequestStatus | None,
    ) -> tuple[RequestStatus, Composed]:
        """The request, in the store like one that was uploaded; or the one that was accepted `before` by this key."""
        admit = self._admission.begin if before is None else self._admission.terms
        terms = await admit(caller, wish.model)
        request_id = self._store.new_id()
        path, contents = self._store.request_path(request_id), self._store.contents.folder_of(caller.owner)
        try:
            composed = await self._checker.compose(wish.model, served.version, path, wish, contents=contents)
            verdict = composed.verdict
            if verdict.error is not None:
                raise FieldError(from_fields(verdict.error), composed.param)
            if before is not None:
                self._store.received.discard(request_id)
                return before, composed
            await self._admission.held(verdict, request_id, served, caller, terms)
            await to_thread.run_sync(self._store.received.sync, request_id)
            status = await self._admission.accept(request_id, served, caller, terms, verdict, submit=submit)
        except AcceptedBeforeError as same:  # by a call at the same time
            self._store.received.discard(request_id)
            return await self._waiting.until_final(same.request, 0.0, caller), composed
        except BaseException as error:
            if not (isinstance(error, AwayError) and error.may_be_done):  # else a sweep sees whether it was accepted
                self._store.received.discard(request_id)
            raise
        return status, composed

    async def _texts(
        self, request_id: RequestId, caller: Identity, answer: Answer, *, has_key: bool
    ) -> AsyncIterator[str]:
        """What a stream sends."""
        async for text in self._told(request_id, caller, answer, has_key=has_key):
            yield text
        if has_key:
            self._returning.go(request_id, has_heard=True)

    async def _told(
        self, request_id: RequestId, caller: Identity, answer: Answer, *, has_key: bool
    ) -> AsyncIterator[str]:
        for chunk in answer.beginning():
            yield _data(chunk)
        status: RequestStatus | None = None
        async for told in self._streams.follow(request_id, caller):
            if isinstance(told, RequestStatus):
                status = told
            elif not told:
                yield COMMENT
            elif chunks := answer.news(_tokens(told)):
                yield "".join(map(_data, chunks))
        if (error := _error_of(status)) is not None:
            yield _data(error_body(error))
            if status is None and not has_key:
                cancel_soon(self._store, request_id, self._cancelling)  # nobody can ask for it again
            return
        for chunk in answer.ending():
            yield _data(chunk)
        yield _DONE

    def _tokens(self, request_id: RequestId) -> list[Token]:
        """All of a request that is done."""
        tokens: list[Token] = []
        after = 0
        while events := self._store.events.read(request_id, after):
            after = events[-1].id
            tokens += _tokens(events)
        return tokens

    async def _tokenizer(self, model: str, served: Served) -> Any:
        version, known = self._tokenizers.get(model, ("", None))
        if version != served.version:
            known = None
            if served.tokenizer is not None:
                known = await to_thread.run_sync(load_tokenizer, served.tokenizer)
            self._tokenizers[model] = (served.version, known)
        return known


def _tokens(events: list[Event]) -> list[Token]:
    return [from_json(Token, json.loads(event.data)) for event in events if event.kind == TOKEN]


def _error_of(status: RequestStatus | None) -> PolytraceError | None:
    """Why there is no answer."""
    if status is None or not status.state.is_final:
        return CapacityError("the service is stopping: ask again")
    if status.state is RequestState.DONE:
        return None
    return status.error or ServiceError("the request ended without a result")


def _data(plain: dict[str, Any]) -> str:
    return f"data: {json.dumps(plain, separators=(',', ':'))}\n\n"
