"""Verdicts that a checking process remembers: a request that is like one before it need not be worked out again.

What a verdict says of a request with one prompt follows from its graph, the length of the prompt, and its constants: of
those that are floating point from their dtypes and shapes alone. So a sweep over prompts, vectors or seeds is worked
out once. With several prompts it matters which of their tokens are equal, and nothing is remembered. Nor is it of a
graph whose shapes may follow from values (`engine.known`), nor where anything stands on the service or goes on.

Each owner's are remembered apart, so the time that a check takes tells nobody what others ask.

Owns what "like" is. The file itself, and the tokens, are checked each time.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from polytrace.tensors import RawTensor
from polytrace.wire import decode_tensors

if TYPE_CHECKING:
    from api.worker import Verdict
    from polytrace.graph import Request

MAX_BYTES = 64 << 10  # of a request, and of the facts that are remembered of one
_MOST = 512  # verdicts, of all deployments
_ONE_PROMPT = [[1], 0]  # as a request says that it has one invoke with its one prompt


@dataclass(frozen=True, slots=True)
class Likeness:
    """What requests that are alike have in common, and the one's own tokens."""

    digest: bytes
    tokens: tuple[int, ...]


def likeness(model: str, version: str, owner: str, content: bytes) -> Likeness | None:
    """Of an owner's request. None where a verdict may follow from more than what is compared.

    Raises WireError as decoding does.
    """
    body, tensors = decode_tensors(content, "request")
    if not isinstance(body, dict) or body.keys() & {"stored", "keeps", "generations", "inputs"}:
        return None
    prompts, seed = body.get("prompts"), body.get("seed")
    if not isinstance(prompts, list) or len(prompts) != 1 or body.get("invokes") != _ONE_PROMPT:
        return None
    (tokens,) = prompts
    if not isinstance(tokens, list) or not tokens or set(map(type, tokens)) != {int}:
        return None
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        return None
    rest = {name: value for name, value in body.items() if name not in ("prompts", "seed")}
    constants = [[name, raw.dtype, raw.shape, *_told(raw)] for name, raw in tensors.items()]
    text = json.dumps([model, version, owner, rest, len(tokens), constants])
    return Likeness(blake2b(text.encode(), digest_size=32).digest(), tuple(tokens))


def is_remembered(request: Request) -> bool:
    """Whether its verdict follows from what is compared."""
    from engine.known import looks_at_data
    from polytrace.graph import Op

    return not any(isinstance(node, Op) and looks_at_data(node) for node in request.graph.nodes)


class Remembered:
    """Verdicts by likeness, those that were asked for last."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    def find(self, likeness: Likeness, num_bytes: int) -> Verdict | None:
        """The verdict on a request of this size that is like one before."""
        found = self._known.get(likeness.digest)
        if found is None:
            return None
        self._known.move_to_end(likeness.digest)
        return replace(found, demand=replace(found.demand, request_bytes=num_bytes))

    def keep(self, likeness: Likeness, verdict: Verdict) -> None:
        """For those that come after it."""
        if verdict.error is None and len(verdict.facts or b"") <= MAX_BYTES:
            self._known[likeness.digest] = verdict
            if len(self._known) > _MOST:
                self._known.popitem(last=False)


def _told(raw: RawTensor) -> list[str]:
    is_float = raw.dtype.startswith(("float", "bfloat"))
    return [] if is_float else [blake2b(raw.data, digest_size=32).hexdigest()]
