"""Calls of the store from the event loop on the way that every submit takes: in threads of their own.

As `anyio.to_thread`, at a third of its cost: nothing here is counted against other calls, and a call goes on when
nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

_THREADS = 32  # many that wait for the disk at once wait for it together

_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hop")  # makes a thread when none is idle


async def hop(function: Callable[..., T], *arguments: Any) -> T:
    """What the function returns or raises, called in a thread with the call's context (`api.log_lines`)."""
    call = partial(contextvars.copy_context().run, function, *arguments)
    return await asyncio.get_running_loop().run_in_executor(_threads, call)
