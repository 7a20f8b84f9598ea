"""What a `Model` talks to: a service (`polytrace.http_backend`) or shards in this process (`engine.local`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from polytrace.certificate import Certificate, Receipt
from polytrace.description import ModelDescription
from polytrace.graph import Request
from polytrace.progress import Hear, HearTokens, Tell, hear_no_tokens, hear_nothing, tell_nobody


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a finished request gave back."""

    values: Mapping[str, Any]  # by save name: torch tensors when torch is importable, else numpy arrays
    receipt: Receipt


class Backend(Protocol):
    """Answers about one model. Every method may raise any `PolytraceError`."""

    def describe(self) -> ModelDescription:
        """The model's tree, sites, parameters and limits; the same object every time."""

    def tokenizer_json(self) -> bytes | None:
        """The bytes of the model's `tokenizer.json`, None when it has none."""

    def validate(self, request: Request) -> Certificate:
        """What the request would cost and return. Nothing runs."""

    def run(
        self,
        request: Request,
        tell: Tell = tell_nobody,
        hear: Hear = hear_nothing,
        hear_tokens: HearTokens = hear_no_tokens,
    ) -> Result:
        """Runs the request and waits for its result.

        `tell` hears how many of its passes are done, `hear` its logs, `hear_tokens` new tokens as their steps end.
        """

    def close(self) -> None:
        """Gives back what the backend holds: connections, or the model's memory."""
