"""Classes tried in processes of their own, a few at a time: what crashes or hangs in one stops no other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing import get_context

from bench.families.configurations import classes
from bench.families.trial import Trial, answer


def try_all(names: Sequence[str], *, jobs: int, timeout_s: float) -> Iterator[Trial]:
    """Trials as they end."""
    get_context("forkserver").set_forkserver_preload(["bench.families.trial"])
    with ThreadPoolExecutor(jobs) as threads:
        for done in as_completed([threads.submit(_try_apart, name, timeout_s) for name in names]):
            yield done.result()


def _try_apart(name: str, timeout_s: float) -> Trial:
    context = get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, name))
    process.start()
    theirs.close()
    try:
        if ours.poll(timeout_s):
            trial: Trial = ours.recv()
            return trial
        return _without(name, f"did not end within {timeout_s:.0f} s")
    except EOFError:
        return _without(name, "its process crashed")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # the shards that it started are of its group
        process.join()
        ours.close()


def _without(name: str, note: str) -> Trial:
    return Trial(name=name, families=tuple(config.model_type for config in classes()[name]), notes=[note])
