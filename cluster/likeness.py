"""Which requests are alike, so that what was found out of one, or worked out of it, is so of another.

What follows from a request with one prompt follows from its graph, the length of the prompt, and its constants: of
those that are floating point from their dtypes and shapes alone. So a sweep over prompts, vectors or seeds is all
alike. With several prompts it matters which of their tokens are equal; nothing is like such a request, nor like one
where anything stands on the service or goes on.

Each owner's are apart, so the time that a look takes tells nobody what others ask.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b

from polytrace.tensors import RawTensor
from polytrace.wire import decode_tensors

MAX_BYTES = 64 << 10  # of a request, and of what is remembered of one
_ONE_PROMPT = [[1], 0]  # as a request says that it has one invoke with its one prompt


@dataclass(frozen=True, slots=True)
class Likeness:
    """What requests that are alike have in common, and the one's own tokens and seed."""

    digest: bytes
    tokens: tuple[int, ...]
    seed: int


def likeness(model: str, version: str, owner: str, content: bytes) -> Likeness | None:
    """Of an owner's request. None where something may follow from more than what is compared.

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
    return Likeness(blake2b(text.encode(), digest_size=32).digest(), tuple(tokens), seed)


def _told(raw: RawTensor) -> list[str]:
    is_float = raw.dtype.startswith(("float", "bfloat"))
    return [] if is_float else [blake2b(raw.data, digest_size=32).hexdigest()]
