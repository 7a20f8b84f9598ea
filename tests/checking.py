"""What a gateway's workers say of requests, said in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from api import worker
from api.wishes import ChatWish, CompletionWish
from api.worker import Answer, Composed, Verdict


class InProcess:
    """A checker whose one worker is a thread. One at a time in a process: a worker's state is its module's."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1)

    def start(self) -> None:
        worker._worker = worker._Worker(self._store, None)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        worker._worker = None

    async def warm(self, model: str, version: str) -> None:
        await self._run(worker._prepare, model, version)

    async def check(self, model: str, version: str, path: Path, *, contents: Path, certify: bool) -> Verdict:
        verdict: Verdict = await self._run(worker._check, model, version, str(path), str(contents), certify)
        return verdict

    async def compose(
        self, model: str, version: str, path: Path, wish: CompletionWish | ChatWish, *, contents: Path
    ) -> Composed:
        composed: Composed = await self._run(worker._compose, model, version, str(path), str(contents), wish)
        return composed

    async def nearest(
        self, model: str, version: str, path: Path, *, contents: Path, most: Mapping[str, int]
    ) -> str | None:
        found: str | None = await self._run(worker._nearest, model, version, str(path), str(contents), dict(most))
        return found

    async def sites(self, model: str, version: str, asked: bytes) -> Answer:
        answer: Answer = await self._run(worker._sites, model, version, asked)
        return answer

    async def check_edits(self, model: str, version: str, path: Path) -> Verdict:
        verdict: Verdict = await self._run(worker._check_edits, model, version, str(path))
        return verdict

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))
