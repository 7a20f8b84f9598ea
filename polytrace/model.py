"""A served model on the client: its module tree, its tokenizer, and traces on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from polytrace import keeping
from polytrace.aliases import find_aliases
from polytrace.asked_shapes import Answers
from polytrace.backend import Backend
from polytrace.certificate import Certificate, Price, price_of
from polytrace.chat import render
from polytrace.description import ModelDescription
from polytrace.edits.sets import EditSet, KnownEdit, LocalShelf, Shelf, check_name, decode_edits, encode_edits
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Options, Sharing
from polytrace.keywords import check_trace_keywords, taken_keywords
from polytrace.kinds import Kind, value_kind
from polytrace.lines import user_line
from polytrace.modules import Module
from polytrace.renaming import take_renamed
from polytrace.scanning import Checking
from polytrace.session import Session
from polytrace.source_views import Source
from polytrace.standard import StandardModel
from polytrace.support import Support, support_of
from polytrace.tokenizer import ModelTokenizer, load_tokenizer
from polytrace.tracebacks import edge
from polytrace.tracing import Tracer, open_trace
from polytrace.tree import NoSuchNameError, Table, index_description, join

if TYPE_CHECKING:
    from polytrace.edits.block import EditBlock, EditedModel
    from polytrace.generating import GenerateTracer
    from polytrace.maps.mapping import Map
    from polytrace.pricing import Pricing
    from polytrace.streaming import Piece


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


class Model(StandardModel):
    """The root module, and what belongs to the model as a whole. Threads may share it; each has its own open trace."""

    backend: Backend
    description: ModelDescription
    answers: Answers
    _index: Table
    _config: Config
    _tokenizer: list[Any]  # empty until somebody asks
    base: Model  # the model itself; another object where this one's traces start from edits
    shelf: Shelf  # where edits are kept by name
    edits_of_traces: tuple[EditSet, ...]  # that traces start from

    def __init__(
        self,
        backend: Backend,
        rename: Mapping[str, str | Sequence[str]] | None = None,
        *,
        shelf: Shelf | None = None,
    ) -> None:
        """`rename`: other names of modules, beside their own: `polytrace.aliases`. `shelf`: where edits are kept."""
        description = backend.describe()
        super().__init__(self, "")
        table = index_description(description)
        if rename:
            renamed = find_aliases(rename, table.modules, table.children, _taken_names(table))
            for owner, names in renamed.items():
                table.aliases.setdefault(owner, {}).update(names)
            take_renamed(table, renamed)
        self.__dict__.update(
            backend=backend,
            description=description,
            answers={},  # shapes that the service told, by what was asked
            _index=table,
            _config=Config(description.config),
            _tokenizer=[],
            base=self,
            shelf=shelf or LocalShelf(),
            edits_of_traces=(),
        )

    @edge
    def trace(
        self,
        prompts: Any = None,
        *,
        seed: int | None = None,
        sharing: str | Sharing | None = None,
        run: bool = True,
        peek: bool = False,
        edits: Sequence[Any] = (),
        scan: bool = False,
        validate: bool = False,
        blocking: bool = True,
        chat: Mapping[str, Any] | None = None,
        pixel_values: Any = None,
        **others: Any,
    ) -> Tracer:
        """A block whose code is recorded, then sent and run; saved values become the tensors that they are.

        `prompts`: a string, strings, token ids, lists of ids, or integer tensors; conversations of
        `{"role", "content"}` messages, to which `chat` says more (`polytrace.chat`); without prompts,
        `tracer.invoke(prompts)` gives several sets. `seed`: of random operations. `sharing="off"`: no rows are shared,
        not even with your own requests. `run=False`: nothing is sent; `validate(tracer)` tells what it would cost.
        `validate=True`: the service checks all of it before anything runs, and `tracer.certificate` has the price.
        `peek=True`: `if`, `float()`, `print()` and the like on a recorded value run what it is made of, at once.
        `blocking=False`: the block does not wait; `tracer.job` is asked later (`polytrace.jobs`). `async with` waits
        and lets other tasks go on.
        `edits`: what every prompt starts from, in order: names of kept edits, edited models, adapters.
        `pixel_values`: the images that stand in the prompts (`polytrace.images`).
        `scan`: nothing, shapes are always known. Other keywords of nnsight's are taken as `polytrace.keywords` says.
        """
        from polytrace.edits.block import resolved

        check_trace_keywords(self.trace, others)
        sets = (*self.edits_of_traces, *resolved(self, edits))
        session = open_trace()
        if isinstance(session, Session) and session.model.base is self.base:
            if not blocking:
                told = "a trace in a session is part of its request: write model.session(blocking=False)"
                raise GraphError(told, where=user_line())
            chosen = None if sharing is None else _sharing(sharing)
            return session.add_trace(
                prompts,
                seed=seed,
                sharing=chosen,
                run=run,
                validate=validate,
                edits=sets,
                peek=peek,
                chat=chat,
                pixel_values=pixel_values,
            )
        tracer = Tracer(
            self,
            prompts,
            options_of(seed, sharing),
            run,
            chat=chat,
            edits=sets,
            is_peeking=peek,
            pixel_values=pixel_values,
        )
        tracer.checking = Checking.VALIDATE if validate else Checking.NONE
        tracer.is_blocking = blocking
        return tracer

    @edge
    def generate(
        self,
        prompts: Any = None,
        *,
        seed: int | None = None,
        sharing: str | Sharing | None = None,
        run: bool = True,
        edits: Sequence[Any] = (),
        validate: bool = False,
        blocking: bool = True,
        chat: Mapping[str, Any] | None = None,
        stream: Callable[[Piece], Any] | bool | None = None,
        pixel_values: Any = None,
        **given: Any,
    ) -> GenerateTracer:
        """A block as `trace`, whose prompts go on: `with model.generate(prompt, max_new_tokens=20) as tracer:`.

        Code in it acts at step 0, the prompt; `tracer.iter[...]` has the others. Behind the block `tracer.result` has
        `ids`, `text`, `finish` ("length", "eos" or "stop") and with `logprobs=` log-probabilities.

        Keywords, of which `tracer.invoke(prompts, ...)` takes its own: `max_new_tokens`; `do_sample`, `temperature`,
        `top_k` (0: all), `top_p`, `min_p`, `repetition_penalty` as transformers' processors; `seed`; `stop`, a text or
        texts; `eos`, a token id or several (default: the model's own; None: none); `n` samples of each prompt;
        `logprobs`, a number of likeliest tokens to be told beside each. Transformers' `eos_token_id`, `stop_strings`
        and `num_return_sequences` are other names of them. `stream`: a function that is given each token as soon as it
        is there (`polytrace.streaming.Piece`: `id`, `text`, `sequence`, `step`, ...); True prints the text.
        `pixel_values`: the images that stand in the prompts (`polytrace.images`).
        """
        from polytrace.edits.block import resolved
        from polytrace.generating import GenerateTracer

        if isinstance(open_trace(), Session):
            raise GraphError(
                "a session has traces of one forward each: write model.generate(...) outside of it", where=user_line()
            )
        given = taken_keywords(self.generate, given)
        sets = (*self.edits_of_traces, *resolved(self, edits))
        tracer = GenerateTracer(
            self,
            prompts,
            options_of(seed, sharing),
            run,
            given,
            chat=chat,
            edits=sets,
            listener=stream,
            pixel_values=pixel_values,
        )
        tracer.checking = Checking.VALIDATE if validate else Checking.NONE
        tracer.is_blocking = blocking
        return tracer

    def stream(
        self, prompts: Any, body: Callable[[GenerateTracer], Any] | None = None, **given: Any
    ) -> Iterator[Piece]:
        """`for piece in model.stream(prompt, max_new_tokens=20)`: tokens with their text, as they come.

        `body(tracer)` is recorded as the block of `generate` would be, whose keywords `given` are. Leaving the loop
        ends the generation.
        """
        from polytrace.streaming import streamed

        def run(hear: Callable[[Piece], None]) -> None:
            with self.generate(prompts, stream=hear, **given) as tracer:
                if body is not None:
                    body(tracer)

        return streamed(run)

    def scan(
        self,
        prompts: Any = None,
        *,
        seed: int = 0,
        edits: Sequence[Any] = (),
        chat: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Tracer:
        """A trace of which nothing runs: the service checks all that is recorded, saved or not.

        Every value has its `.shape` and `.dtype`, also behind the block, and no data; `tracer.certificate` is what it
        would cost. Raises what the trace would at its submission.
        """
        check_trace_keywords(self.scan, others)
        tracer = self.trace(prompts, seed=seed, run=False, edits=edits, chat=chat)
        tracer.checking = Checking.SCAN
        return tracer

    def session(
        self,
        *,
        seed: int | None = None,
        sharing: str | Sharing | None = None,
        run: bool = True,
        validate: bool = False,
        blocking: bool = True,
        peek: bool = False,
    ) -> Session:
        """A block whose traces are one request: values of earlier ones are used in later ones and stay at the service.

        All saved values come back when the block ends. The options are as in `trace`, and those of all its traces.
        """
        session = Session(self, options_of(seed, sharing), run, is_peeking=peek)
        session.checking = Checking.VALIDATE if validate else Checking.NONE
        session.is_blocking = blocking
        return session

    def edit(self, name: str | None = None, *, shared: bool = False, inplace: bool = False) -> EditBlock:
        """A block whose changes apply to every prompt of later traces: `with model.edit() as edited:`.

        Traces of `edited` start from them. With a name it is kept where the model is served, as the next version of
        that name, for its owner alone or, if `shared`, for everyone who may use the model. `inplace`: this object's
        own traces start from it too.
        """
        from polytrace.edits.block import EditBlock

        return EditBlock(self, name, is_shared=shared, is_in_place=inplace)

    def edited(self, *edits: Any, version: int | None = None) -> EditedModel:
        """The model with edits, in this order: names of kept ones, edited models, adapters. `version`: of a name.

        Raises NotFoundError for a name that is not there.
        """
        from polytrace.edits.block import EditedModel, resolved

        return EditedModel(self, resolved(self, edits, version))

    def edits(self) -> list[KnownEdit]:
        """The edits that are kept by name, with all their versions: one's own, and those that others share."""
        return self.shelf.known()

    def delete_edit(self, name: str, version: int | None = None) -> None:
        """Drops a version of one's own edit, by default all of them. Raises NotFoundError."""
        self.shelf.delete(check_name(name, user_line()), version)

    def clear_edits(self) -> None:
        """Traces start from no edits any more; kept ones stay where they are."""
        self.__dict__["edits_of_traces"] = ()

    def keep_edits(self, name: str, edits: EditSet, *, is_shared: bool) -> EditSet:
        """Keeps edits as the next version of a name; the same edits, called by name and version."""
        version = self.shelf.put(check_name(name, user_line()), encode_edits(edits), is_shared=is_shared)
        return replace(edits, label=f"{name}@{version}")

    def kept_edits(self, name: str, version: int | None) -> EditSet:
        """Edits that are kept by name, by default the newest version. Raises NotFoundError."""
        number, data = self.shelf.get(check_name(name, user_line()), version)
        return decode_edits(data, f"{name}@{number}", max_nodes=self.description.limits.max_nodes)

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
        edits: Sequence[Any] = (),
    ) -> Map:
        """`body()` over any number of prompts; `for part in model.map(...)` gives the values part by part, in order.

        `dataset`: an iterable of prompts, or the `pathlib.Path` of a file with one a line (`.jsonl` too); it is read as
        it is needed. The body is recorded once (once for each number of tokens where it asks for shapes or lengths),
        for one prompt, and returns a dict: each prompt's own values `[prompts, ...]`, or `polytrace.mean(value)` and
        the like, which `results` has at the end. With `prompts=` (one prompt) it is a sweep: `body(item)` is recorded
        for each item of `dataset`. Values have the bits of a trace of the prompt alone.

        `to`: a folder or an address of fsspec (`s3://...`) that gets numbered safetensors files and `index.json`; the
        same map goes on there after a crash. `in_flight`: requests under way at once. `on_error="skip"` leaves out
        prompts that cannot be run and lists them. `edits`: what every prompt starts from, as in `trace`. Raises
        GraphError where the body mixes prompts and these do not fit into one pass, ConflictError where the folder has
        another map's parts.
        """
        from polytrace.maps.mapping import Map, Wishes

        if on_error not in ("raise", "skip") or not isinstance(in_flight, int) or in_flight < 1:
            raise GraphError(
                f"on_error is 'raise' or 'skip' and in_flight at least 1, not {on_error!r} and {in_flight!r}",
                where=user_line(),
            )
        model = self.edited(*edits) if edits else self
        labels = dict.fromkeys(edit.label for edit in model.edits_of_traces)
        options = replace(self.trace(seed=seed, sharing=sharing).options, edits=tuple(labels))
        wishes = Wishes(options=options, to=to, in_flight=in_flight, is_skipping=on_error == "skip")
        return Map(model, dataset, body, prompts, wishes)

    @edge
    def validate(self, tracer: Tracer) -> Certificate:
        """What a trace would cost and return: shapes, bytes, passes. Nothing runs; inside its block or after it.

        Of a service also the limits that hold for it, and whether it would be taken now. Printed it is a table.
        """
        if not isinstance(tracer, Tracer):
            raise GraphError(
                f"validate takes a trace, not a {type(tracer).__name__}: "
                "`with model.trace(prompts, run=False) as tracer: ...`, then model.validate(tracer)",
                where=user_line(),
            )
        return self.backend.validate(tracer.built_request())

    def price(self, *tracers: Tracer) -> Price:
        """What traces, or sessions, would cost all together. Nothing runs."""
        return price_of(self.validate(tracer) for tracer in tracers)

    def pricing(self) -> Pricing:
        """`with model.pricing() as pricing:` certifies what `pricing.model` would run, and `pricing.price` adds it up.

        For code that makes its traces itself: a method, a loop. Nothing runs; where code needs a number of a result,
        the block ends, and the price says that it is partial.
        """
        from polytrace.pricing import Pricing

        return Pricing(self)

    def source_of(self, path: str) -> Source:
        """As `module.source`, of the module at a path."""
        return Source(self, path, "")

    def support(self) -> Support:
        """Standard names: where each is in this model, in which layers and of what dimensions, and what was checked.

        Printed it is a table; as data, rows. See `polytrace.support`.
        """
        return support_of(self._table)

    def kept(self, name: str | None = None) -> Any:
        """What `value.keep(...)` has left on the service: the `polytrace.Kept` of a name, or a list of all.

        Raises NotFoundError where there is none of that name (any more).
        """
        return keeping.kept(self, name)

    def state(self, name: str, init: Any = None) -> keeping.NamedState:
        """A named tensor on the service, which requests read and update in the order they are submitted.

        `init`: its first content, a tensor, array or number; one that is there already keeps what it has, and has to be
        of the same dtype and shape. Without `init` NotFoundError where there is none.
        """
        return keeping.named_state(self, name, init)

    def states(self) -> list[keeping.NamedState]:
        """The states that are there."""
        return keeping.states(self)

    @property
    def tokenizer(self) -> Any:
        """The model's own tokenizer (`polytrace.tokenizer.ModelTokenizer`), None when it came without one."""
        if not self._tokenizer:
            data = self.backend.tokenizer_json()
            self._tokenizer.append(ModelTokenizer(load_tokenizer(data)) if data is not None else None)
        return self._tokenizer[0]

    def render_chat(self, messages: Any, **chat: Any) -> str:
        """The text that one conversation is as a prompt; `chat` as of `trace`."""
        return render(self.description.chat, messages, chat)

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

    def _check_called(self, used: str) -> None:
        """Raises GraphError where it is not known yet what the model's forward visits."""

    def _tracer(self, what: str, path: str, name: str = "") -> Tracer:
        """The open trace on this model, for `what` at a path to be used in."""
        tracer = open_trace()
        if tracer is None:
            used = what + (join(path, name) if name else path)
            raise GraphError(f"{used} exists inside a trace: `with model.trace(prompt):`", where=user_line())
        if tracer.model.base is not self.base:
            raise GraphError(f"the open trace is on another model, {tracer.model.description.name}", where=user_line())
        return tracer


def options_of(seed: int | None, sharing: str | Sharing | None) -> Options:
    seed = 0 if seed is None else seed
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise GraphError(f"the seed is an integer from 0 to 2**63 - 1, not {seed!r}", where=user_line())
    return Options(seed=seed, sharing=Sharing.TENANT if sharing is None else _sharing(sharing))


def _sharing(sharing: str | Sharing) -> Sharing:
    try:
        return Sharing(sharing)
    except ValueError:
        known = " or ".join(repr(member.value) for member in Sharing)
        raise GraphError(f"sharing is {known}, not {sharing!r}", where=user_line()) from None


def _taken_names(table: Table) -> dict[str, set[str]]:
    """Names that mean something on each module besides its children."""
    taken = {path: set(dir(Model if not path else Module)) for path in table.modules}
    for path, names in table.own_parameters.items():
        taken.setdefault(path, set()).update(names)
    for path, port in table.ports:
        taken[path].add(port)
    for path, points in table.points.items():
        taken[path].update(points)
    return taken
