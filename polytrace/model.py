"""A served model on the client: its module tree, its tokenizer, and traces on it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polytrace.asked_shapes import Answers
from polytrace.backend import Backend
from polytrace.certificate import Certificate
from polytrace.description import ModelDescription
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Options, Sharing
from polytrace.kinds import Kind, value_kind
from polytrace.lines import user_line
from polytrace.modules import Module
from polytrace.tokenizer import load_tokenizer
from polytrace.tracing import Tracer, open_trace
from polytrace.tree import NoSuchNameError, Table, index_description, join

if TYPE_CHECKING:
    from polytrace.mapping import Map


class Config(dict[str, Any]):
    """A Hugging Face configuration: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self:
            raise NoSuchNameError(f"the configuration has no {name!r}{nearest(name, self)}", where=user_line())
        value = self[name]
        return Config(value) if isinstance(value, dict) else value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self})


class Model(Module):
    """The root module, and what belongs to the model as a whole. Threads may share it; each has its own open trace."""

    backend: Backend
    description: ModelDescription
    answers: Answers
    _index: Table
    _config: Config
    _tokenizer: list[Any]  # empty until somebody asks

    def __init__(self, backend: Backend) -> None:
        description = backend.describe()
        super().__init__(self, "")
        self.__dict__.update(
            backend=backend,
            description=description,
            answers={},  # shapes that the service told, by what was asked
            _index=index_description(description),
            _config=Config(description.config),
            _tokenizer=[],
        )

    def trace(
        self, prompts: Any = None, *, seed: int = 0, sharing: str | Sharing = Sharing.TENANT, run: bool = True
    ) -> Tracer:
        """A block whose code is recorded, then sent and run; saved values become the tensors that they are.

        `prompts`: a string, strings, token ids, lists of ids, or integer tensors; without them,
        `tracer.invoke(prompts)` gives several sets. `seed`: of random operations. `sharing="off"`: no rows are shared,
        not even with your own requests. `run=False`: nothing is sent; `validate(tracer)` tells what it would cost.
        """
        if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise GraphError(f"the seed is an integer from 0 to 2**63 - 1, not {seed!r}", where=user_line())
        try:
            chosen = Sharing(sharing)
        except ValueError:
            known = " or ".join(repr(member.value) for member in Sharing)
            raise GraphError(f"sharing is {known}, not {sharing!r}", where=user_line()) from None
        return Tracer(self, prompts, Options(seed=seed, sharing=chosen), run)

    def map(
        self,
        dataset: Any,
        body: Callable[..., Any],
        *,
        prompts: Any = None,
        to: str | os.PathLike[str] | None = None,
        seed: int = 0,
        sharing: str | Sharing = Sharing.TENANT,
        in_flight: int = 4,
        on_error: str = "raise",
    ) -> Map:
        """`body()` over any number of prompts; `for part in model.map(...)` gives the values part by part, in order.

        `dataset`: an iterable of prompts, or the `pathlib.Path` of a file with one a line (`.jsonl` too); it is read as
        it is needed. The body is recorded once (once for each number of tokens where it asks for shapes or lengths),
        for one prompt, and returns a dict: each prompt's own values `[prompts, ...]`, or `polytrace.mean(value)` and
        the like, which `results` has at the end. With `prompts=` (one prompt) it is a sweep: `body(item)` is recorded
        for each item of `dataset`. Values have the bits of a trace of the prompt alone.

        `to`: a folder or an address of fsspec (`s3://...`) that gets numbered safetensors files and `index.json`; the
        same map goes on there after a crash. `in_flight`: requests under way at once. `on_error="skip"` leaves out
        prompts that cannot be run and lists them. Raises GraphError where the body mixes prompts and these do not fit
        into one pass, ConflictError where the folder has another map's parts.
        """
        from polytrace.mapping import Map, Wishes

        if on_error not in ("raise", "skip") or not isinstance(in_flight, int) or in_flight < 1:
            raise GraphError(
                f"on_error is 'raise' or 'skip' and in_flight at least 1, not {on_error!r} and {in_flight!r}",
                where=user_line(),
            )
        options = self.trace(seed=seed, sharing=sharing).options
        wishes = Wishes(options=options, to=to, in_flight=in_flight, is_skipping=on_error == "skip")
        return Map(self, dataset, body, prompts, wishes)

    def validate(self, tracer: Tracer) -> Certificate:
        """What a trace would cost and return: shapes, bytes, passes. Nothing runs; inside its block or after it."""
        return self.backend.validate(tracer.built_request())

    @property
    def tokenizer(self) -> Any:
        """The model's own `tokenizers.Tokenizer`, None when it came without one."""
        if not self._tokenizer:
            data = self.backend.tokenizer_json()
            self._tokenizer.append(load_tokenizer(data) if data is not None else None)
        return self._tokenizer[0]

    @property
    def config(self) -> Config:
        """The Hugging Face configuration, by attribute or key."""
        return self._config

    @cached_property
    def kind(self) -> Kind:
        """What values are made of in this process."""
        return value_kind()

    def close(self) -> None:
        """Gives back the connection, or the model's memory."""
        self.backend.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tracer(self, what: str, path: str, name: str = "") -> Tracer:
        """The open trace on this model, for `what` at a path to be used in."""
        tracer = open_trace()
        if tracer is None:
            used = what + (join(path, name) if name else path)
            raise GraphError(f"{used} exists inside a trace: `with model.trace(prompt):`", where=user_line())
        if tracer.model is not self:
            raise GraphError(f"the open trace is on another model, {tracer.model.description.name}", where=user_line())
        return tracer
