"""What OpenAI's clients may ask for on `/v1/completions` and `/v1/chat/completions`, and what of it cannot be honoured.

Fields have OpenAI's names and meanings, a few vLLM's (`top_k`, `min_p`, `repetition_penalty`, `stop_token_ids`,
`ignore_eos`, `chat_template_kwargs`), and `polytrace` is our own: a steering vector, or a graph. A field that is not
here, and a value of one that is here only to be refused, is an error and never left out in silence.

The first thing that is wrong ends the check (`fail_fast`, `Strict`): a million wrong values would else be a million
errors, and nobody is answered while they are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from polytrace.errors import PolytraceError, UserError
from polytrace.generation import MAX_LIKELIEST, MAX_STOP_CHARS, MAX_STOPS

MAX_SAMPLES = 128
MAX_PROMPTS = 2048
MAX_STEERS = 256
_DEFAULT_TOKENS = 16  # OpenAI's, of a completion

StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _listed(value: Any) -> Any:
    """One as a list of one."""
    return [value] if isinstance(value, (str, dict)) else value


def _kind_of_prompt(prompt: Any) -> str | None:
    """Which of a prompt's forms it is to be, by its first part."""
    if isinstance(prompt, str):
        return "text"
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    return {str: "texts", int: "ids", list: "lists"}.get(type(first))


class Strict(BaseModel):
    """Has the fields that it names, and no others."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, body: Any) -> Any:
        """The body with no more than one unknown field, which is then refused by its name."""
        if not isinstance(body, dict):
            return body
        unknown = next((name for name in body if name not in cls.model_fields), None)
        return {name: value for name, value in body.items() if name == unknown or name in cls.model_fields}


class Steer(Strict):
    """A vector that is added to the residual stream behind a decoder layer, at every step."""

    layer: Annotated[int, Field(ge=0)]
    vector: Annotated[list[Finite], Field(min_length=1, fail_fast=True)]  # of the model's hidden size
    scale: Finite = 1.0
    positions: Literal["all", "prompt", "generated"] = "all"


class Extension(Strict):
    """What goes beyond OpenAI's interface."""

    steer: (
        Annotated[
            list[Steer],
            Field(max_length=MAX_STEERS, fail_fast=True),
            BeforeValidator(_listed, json_schema_input_type=Steer | list[Steer]),
        ]
        | None
    ) = None
    request: str | None = None  # a request file in base64; its prompts and how they go on are replaced

    @model_validator(mode="after")
    def _is_one(self) -> Extension:
        if self.steer is not None and self.request is not None:
            raise ValueError("either steer or request, not both")
        return self

    @property
    def steers(self) -> list[Steer]:
        return self.steer or []


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is obfuscated here


class Wish(Strict):
    """What both routes take."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None  # 0: the likeliest token, always
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] | None = None
    stop: (
        Annotated[
            list[StopText],
            Field(max_length=MAX_STOPS, fail_fast=True),
            BeforeValidator(_listed, json_schema_input_type=StopText | list[StopText]),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=32, fail_fast=True)] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # for the caller's own records, as is
    metadata: dict[str, Any] | None = None
    polytrace: Extension | None = None
    # here to be refused unless they say nothing
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> Wish:
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                told = f"{name} is not possible here; repetition_penalty and a graph in polytrace are"
                raise _WrongField(told, name)
        if self.stream_options is not None and not self.stream:
            raise _WrongField("stream_options needs stream", "stream_options")
        return self

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple(self.stop or ())

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def source(self) -> str:
        """The field that prompts come from."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """New tokens of a sequence, at most; None: as many as the model's context has room for."""
        raise NotImplementedError

    @property
    def likeliest(self) -> int | None:
        """How many likely tokens are told with their log-probabilities beside each one; None: none, and not its own."""
        raise NotImplementedError


class CompletionWish(Wish):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("texts")]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("lists")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt",
            custom_error_message="a text, texts, token ids or lists of token ids is wanted, and at least one",
        ),
    ]
    max_tokens: Annotated[int, Field(ge=1)] | None = _DEFAULT_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _is_completion(self) -> CompletionWish:
        if self.suffix:
            raise _WrongField("suffix is not possible here", "suffix")
        if self.best_of not in (None, self.samples):
            raise _WrongField("best_of is not possible here, but for the value of n", "best_of")
        if self.echo and self.logprobs is not None:
            raise _WrongField("echo with logprobs is not possible here: trace the prompt for its logits", "echo")
        if _kind_of_prompt(self.prompt) in ("text", "texts"):
            _check_text(self.prompt, "prompt")
        return self

    @property
    def source(self) -> str:
        return "prompt"

    @property
    def most_tokens(self) -> int | None:
        return _DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class ResponseFormat(Strict):
    type: Literal["text"]


class ChatWish(Wish):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None  # None: unless the last message is the assistant's
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_chat(self) -> ChatWish:
        limits = self.max_tokens, self.max_completion_tokens
        if None not in limits and limits[0] != limits[1]:
            told = f"max_tokens is {limits[0]} and max_completion_tokens {limits[1]}: send one of the two"
            raise _WrongField(told, "max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise _WrongField("top_logprobs needs logprobs", "top_logprobs")
        if "chat_template" in (self.chat_template_kwargs or {}):
            raise _WrongField("a template comes with the model and not with a request", "chat_template_kwargs")
        _check_text(self.messages, "messages")
        _check_text(self.chat_template_kwargs, "chat_template_kwargs")
        return self

    @property
    def source(self) -> str:
        return "messages"

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class FieldError(Exception):
    """An error, and the field of the body that it is about."""

    def __init__(self, error: PolytraceError, param: str | None) -> None:
        super().__init__(str(error))
        self.error = error
        self.param = param


@contextmanager
def about(param: str) -> Iterator[None]:
    """What is wrong inside is about this field, unless it says another."""
    try:
        yield
    except WishError:
        raise
    except PolytraceError as error:
        raise FieldError(error, param) from error


class _WrongField(ValueError):
    """What a check of several fields finds, in the one that is to change."""

    def __init__(self, told: str, param: str) -> None:
        super().__init__(told)
        self.param = param


def _check_text(value: Any, param: str) -> None:
    """JSON may write halves of characters, which are no text to any tokenizer."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _WrongField("there is an unpaired surrogate in it, which is half a character", param) from None


class WishError(UserError):
    """What was asked for cannot be; `param` is the field."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


def wish_error(errors: Sequence[Any]) -> WishError:
    """The first thing that is wrong with a body, of what pydantic found."""
    first = errors[0]
    loc = [str(part) for part in first["loc"] if part != "body"]
    path, param = ".".join(loc), loc[0] if loc else None
    if first["type"] == "extra_forbidden":
        return WishError(f"{path} is not possible here", param)
    if first["type"] == "json_invalid":
        return WishError(f"the body is not JSON: {first['ctx']['error']} at character {path}", None)
    told = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not path:
        wrong = first.get("ctx", {}).get("error")  # of ours, about several fields
        return WishError(told, wrong.param if isinstance(wrong, _WrongField) else param)
    return WishError(f"{path or 'the body'}: {told}", param)


def sampling_temperature(wish: Wish) -> float:
    """OpenAI's default is 1, and not the likeliest token."""
    return 1.0 if wish.temperature is None else wish.temperature
