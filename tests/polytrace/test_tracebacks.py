"""Errors show the user's frames, the message and the user's line; what polytrace's depths say on request alone."""

from __future__ import annotations

import asyncio
import io
import linecache
import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mistakes import MISTAKES, Mistake
from torch import Tensor, nn

import polytrace
from bench import tinyworld
from polytrace.errors import GraphError, PolytraceError, ServiceError
from polytrace.model import Model


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    with polytrace.load(str(tinyworld.FOLDER), threads=1) as model:
        yield model


def frames(error: BaseException) -> list[str]:
    return [frame.filename.rpartition("/")[2] for frame in traceback.extract_tb(error.__traceback__)]


def raised(call: Callable[[], Any]) -> PolytraceError:
    """What a call raises, with the frames that it has here."""
    with pytest.raises(PolytraceError) as caught:
        call()
    return caught.value


def too_short(model: Any) -> None:
    with model.trace([[1, 2, 3]]):
        hidden = model.model.layers[0].output[0]
        model.model.layers[1].output[0][:] = hidden[:, :2]
        model.lm_head.output.save()


def test_an_error_at_the_end_of_a_trace_has_the_users_frames_and_line_alone(model: Any) -> None:
    error = raised(lambda: too_short(model))
    assert set(frames(error)) == {"test_tracebacks.py"}
    shown = "".join(traceback.format_exception(error))
    assert shown.count("Traceback") == 1 and "direct cause" not in shown
    *_, message, line = shown.rstrip("\n").split("\n")
    assert message.startswith("polytrace.errors.GraphError: ") and message.endswith(f"({error.where})")
    assert line == "    model.model.layers[1].output[0][:] = hidden[:, :2]"
    assert str(error).endswith(f"({error.where})") and "\n" not in str(error)


async def too_short_later(model: Any) -> None:
    async with model.trace([[1, 2, 3]]):
        hidden = model.model.layers[0].output[0]
        model.model.layers[1].output[0][:] = hidden[:, :2]
        model.lm_head.output.save()


def test_so_have_errors_of_async_blocks_jobs_and_sessions(model: Any) -> None:
    own = [name for name in frames(raised(lambda: asyncio.run(too_short_later(model)))) if name != "runners.py"]
    assert set(own) <= {"test_tracebacks.py", "base_events.py"}

    with model.trace([[1, 2, 3]], blocking=False) as tracer:
        hidden = model.model.layers[0].output[0]
        torch.linalg.cholesky(-torch.ones(3, 3) * hidden.mean().abs()).save()
    error = raised(lambda: tracer.job.result())
    again = raised(lambda: tracer.job.result())
    assert set(frames(error)) == {"test_tracebacks.py"}
    assert error is again and error.__notes__ == [
        "    torch.linalg.cholesky(-torch.ones(3, 3) * hidden.mean().abs()).save()"
    ]

    def session() -> None:
        with model.session():
            too_short(model)

    assert set(frames(raised(session))) == {"test_tracebacks.py"}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_no_mistake_shows_more_than_a_few_frames_of_polytraces(mistake: Mistake, model: Any) -> None:
    def make() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mistake.make({"model": model, "torch": torch, "np": np, "io": io, "polytrace": polytrace})

    error = raised(make)
    others = [name for name in frames(error) if name not in ("test_tracebacks.py", "mistakes.py", "notebook.py")]
    most = 8 if "a trace that failed" in mistake.name else 3  # there a value is used behind its block
    assert len(others) <= most and error.__cause__ is None, others


def test_what_a_users_own_module_raised_is_shown_with_their_frames() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    own = polytrace.load(Own())
    error = raised(lambda: own.trace(torch.ones(2, 3)))
    assert set(frames(error)) == {"test_tracebacks.py"}
    assert isinstance(error.__cause__, RuntimeError) and frames(error.__cause__) == ["test_tracebacks.py"]

    library = polytrace.load(nn.Linear(4, 4))
    error = raised(lambda: library.trace(torch.ones(2, 3)))
    assert set(frames(error)) == {"test_tracebacks.py"} and error.__cause__ is None


def test_a_function_of_the_users_that_polytrace_calls_keeps_its_frame(model: Any) -> None:
    def select(hidden: Any) -> Any:
        return hidden[:, 0].not_there

    def cached() -> None:
        with model.trace([[1, 2, 3]]) as tracer:
            tracer.cache([model.model.layers[0].mlp], select=select)

    error = raised(cached)
    assert error.__cause__ is not None
    assert [frame.name for frame in traceback.extract_tb(error.__cause__.__traceback__)] == ["select"]
    assert set(frames(error)) == {"test_tracebacks.py"}


def test_everything_is_there_on_request(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTRACE_TRACEBACK", "full")
    error = raised(lambda: too_short(model))
    assert {"tracing.py", "sending.py"} <= set(frames(error))
    monkeypatch.setenv("POLYTRACE_TRACEBACK", "short")
    assert "tracing.py" not in frames(raised(lambda: too_short(model)))
    monkeypatch.setenv("POLYTRACE_TRACEBACK", "all")
    error = raised(lambda: too_short(model))  # the user's error, not one about the choice
    assert isinstance(error, GraphError) and "tracing.py" in frames(error)
    assert "POLYTRACE_TRACEBACK is 'all': it is full or short" in error.__notes__
    monkeypatch.delenv("POLYTRACE_TRACEBACK")
    with model.trace([[1, 2, 3]]):  # nothing is left open
        assert model.lm_head.output.shape[1] == 3
        model.lm_head.output.save()


def unknown(model: Any) -> None:
    with model.trace([[1, 2, 3]]):
        model.not_there.output.save()


@pytest.mark.parametrize("fails", [unknown, too_short])
def test_what_the_user_was_handling_stays(fails: Callable[[Any], None], model: Any) -> None:
    def handling() -> None:
        try:
            {}["x"]
        except KeyError:
            fails(model)

    error = raised(handling)
    assert isinstance(error.__context__, KeyError) and error.__cause__ is None
    shown = "".join(traceback.format_exception(error))
    assert shown.count("Traceback") == 2 and "During handling of the above exception" in shown
    assert raised(lambda: fails(model)).__context__ is None  # nothing of ours is held


def test_behind_a_cause_of_the_users_stays_what_they_were_handling() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x

    own = polytrace.load(Own())

    def handling() -> None:
        try:
            {}["x"]
        except KeyError:
            own.trace(torch.ones(2, 3))

    error = raised(handling)
    assert isinstance(error.__cause__, RuntimeError) and frames(error.__cause__) == ["test_tracebacks.py"]
    assert isinstance(error.__cause__.__context__, KeyError)
    assert raised(lambda: own.trace(torch.ones(2, 3))).__cause__.__context__ is None  # type: ignore[union-attr]


@pytest.mark.parametrize("fails", ["model.not_there.output.save()", "(model.lm_head.output @ torch.ones(3)).save()"])
def test_the_frame_of_an_installed_package_that_has_the_block_stays(fails: str, model: Any) -> None:
    file = os.path.join(sysconfig.get_path("purelib"), "labs", "run.py")
    names: dict[str, Any] = {"torch": torch}
    exec(compile(f"def helper(model):\n    with model.trace([[1, 2]]):\n        {fails}\n", file, "exec"), names)
    error = raised(lambda: names["helper"](model))
    assert set(frames(error)) == {"test_tracebacks.py", "run.py"}


def test_a_line_that_cannot_be_read_and_one_of_another_process_add_nothing(backend: Any) -> None:
    def failing(where: str) -> PolytraceError:
        def results(_request: Any) -> Any:
            raise GraphError("it is wrong", where=where)

        backend.results = results
        return raised(lambda: save_logits(Model(backend)))

    assert not hasattr(failing("elsewhere.py:3"), "__notes__")
    assert not hasattr(failing("?:0"), "__notes__")

    def recorded(name: str) -> PolytraceError:
        program = "with model.trace([[1, 2]], run=False):\n    model.lm_head.output.save()\n"
        exec(compile(program, name, "exec"), {"model": Model(backend)})
        return failing(f"{name}:2")

    assert not hasattr(recorded("gone.py"), "__notes__")
    linecache.cache["cell"] = (0, None, ["\n", "  model.lm_head.output.save()\n"], "cell")
    assert recorded("cell").__notes__ == ["    model.lm_head.output.save()"]


def test_a_fault_of_ours_keeps_all_that_caused_it(backend: Any) -> None:
    def results(_request: Any) -> Any:
        try:
            return {}["x"]
        except KeyError as error:
            raise ServiceError("the pass failed") from error

    backend.results = results
    error = raised(lambda: save_logits(Model(backend)))
    assert isinstance(error.__cause__, KeyError) and "sending.py" in frames(error)


def save_logits(model: Model) -> None:
    with model.trace([[1, 2]]):
        model.lm_head.output.save()
