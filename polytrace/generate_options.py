"""Keywords of `model.generate` and of its invokes: how prompts go on. Names are transformers' and OpenAI's.

Owns which keywords there are, what each defaults to, and what of nnsight's and transformers' is taken though it means
nothing here. The numbers themselves are checked by `polytrace.generation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from polytrace.description import ModelDescription
from polytrace.errors import GraphError, TooLargeError
from polytrace.generation import refusals
from polytrace.grammar import nearest
from polytrace.graph import Generation, Invoke, Sampling
from polytrace.images import sampled_images
from polytrace.lines import user_line
from polytrace.literals import scalar

MAX_SAMPLES = 1024
_OTHER_NAMES = {"eos_token_id": "eos", "stop_strings": "stop", "num_return_sequences": "n"}
_SAMPLING: dict[str, type] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
}
_OF_DRAWS = ("temperature", "top_k", "top_p", "min_p")  # what means something only where tokens are drawn
NAMES = ("max_new_tokens", *_SAMPLING, "eos", "stop", "n", "logprobs", *_OTHER_NAMES)
# what means nothing here, or has one value that is taken
_FOREIGN: dict[str, tuple[Any, ...] | None] = {
    "pad_token_id": None,
    "bos_token_id": None,
    "attention_mask": (None,),
    "use_cache": (True, None),
    "num_beams": (1, None),
    "return_dict_in_generate": None,
    "synced_gpus": (False, None),
}


class Ways:
    """How prompts of one trace go on: what the trace says, and what an invoke says for itself."""

    def __init__(self, description: ModelDescription, given: Mapping[str, Any], seed: int) -> None:
        """Raises GraphError for a keyword that there is not, or a value that cannot be."""
        self._description = description
        self._given = {"seed": seed, **_plain(given, "model.generate")}
        self._made: dict[tuple[int, Generation, int], Invoke] = {}
        _generation({**self._given, "max_new_tokens": 1}, ())

    def of(self, invoke: Invoke, own: Mapping[str, Any]) -> Invoke:
        """An invoke that goes on. Raises GraphError, TooLargeError beyond the model's context."""
        given = self._given | _plain(own, "tracer.invoke")
        if given.get("max_new_tokens") is None:
            told = "say how many tokens may be new: model.generate(prompts, max_new_tokens=20)"
            raise GraphError(told, where=user_line())
        samples = _integer("n", given.get("n") or 1)
        if not 1 <= samples <= MAX_SAMPLES:
            raise GraphError(f"n is a number of samples from 1 to {MAX_SAMPLES}, not {samples}", where=user_line())
        way = _generation(given, _own_eos(self._description))
        if samples > 1 and not way.sampling.do_sample:
            told = f"{samples} samples of a prompt would all be the same: say do_sample=True"
            raise GraphError(told, where=user_line())
        limit = self._description.limits.max_sequence_tokens
        if invoke.longest + way.max_new_tokens > limit:
            raise TooLargeError(
                f"{invoke.longest} tokens and {way.max_new_tokens} new ones are {invoke.longest + way.max_new_tokens}; "
                f"this model takes {limit}",
                where=user_line(),
            )
        sequences = tuple([one for one in invoke.sequences for _ in range(samples)])
        if invoke.inputs is not None:  # one of its own, that nobody else keeps
            return replace(invoke, sequences=sequences, generation=way, inputs=sampled_images(invoke, samples))
        key = (id(invoke), way, samples)
        if key not in self._made:
            self._made[key] = replace(invoke, sequences=sequences, generation=way)
        return self._made[key]


def is_source(own: Mapping[str, Any]) -> bool:
    """Whether an invoke says that it does not go on."""
    return own.get("generate") is False or scalar(own.get("max_new_tokens")) == 0


def _plain(given: Mapping[str, Any], called: str) -> dict[str, Any]:
    """The keywords under one name each."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in _FOREIGN:
            accepted = _FOREIGN[name]
            if accepted is not None and not any(value is one or value == one for one in accepted):
                raise GraphError(f"{called}({name}={value!r}): only {accepted[0]!r} can be", where=user_line())
            continue
        if name == "peek":
            told = "a generation's values are there when it has ended: look at the prompt in a trace of its own"
            raise GraphError(f"{called}(peek=...): {told}", where=user_line())
        if name not in NAMES:
            told = nearest(name, NAMES) or f"; it has {', '.join(NAMES)}"
            raise GraphError(f"{called} has no keyword {name!r}{told}", where=user_line())
        plain = _OTHER_NAMES.get(name, name)
        if plain in found and found[plain] != value:
            raise GraphError(f"{name} is another name of {plain}: give one of them", where=user_line())
        found[plain] = value
    return found


def _generation(given: Mapping[str, Any], own_eos: tuple[int, ...]) -> Generation:
    numbers: dict[str, Any] = {}
    for name, kind in _SAMPLING.items():
        if given.get(name) is not None:
            numbers[name] = _NUMBERS[kind](name, given[name])
    sampling = Sampling(**numbers)
    if not sampling.do_sample:
        idle = [name for name in _OF_DRAWS if getattr(sampling, name) != getattr(Sampling(), name)]
        if idle:
            told = f"{idle[0]}={given[idle[0]]!r} means something where tokens are drawn: say do_sample=True"
            raise GraphError(told, where=user_line())
    logprobs = given.get("logprobs")
    if isinstance(logprobs, bool):
        logprobs = 0 if logprobs else None
    way = Generation(
        max_new_tokens=_integer("max_new_tokens", given["max_new_tokens"]),
        sampling=sampling,
        eos=_tokens(given["eos"]) if "eos" in given else own_eos,
        stop=_texts(given.get("stop")),
        logprobs=None if logprobs is None else _integer("logprobs", logprobs),
    )
    for told in refusals(way):
        raise GraphError(told, where=user_line())
    return way


def _own_eos(description: ModelDescription) -> tuple[int, ...]:
    """The tokens that end a sequence by the model's own configuration."""
    if description.eos:
        return description.eos
    config = description.config
    for part in (config, config.get("text_config"), config.get("decoder")):
        if isinstance(part, Mapping) and part.get("eos_token_id") is not None:
            return _tokens(part["eos_token_id"])
    return ()


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise GraphError(f"{name} is True or False, not {value!r}", where=user_line())
    return value


def _integer(name: str, value: Any) -> int:
    number = scalar(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise GraphError(f"{name} is a whole number, not {value!r}", where=user_line())
    return number


def _float(name: str, value: Any) -> float:
    number = scalar(value)
    if number is None or isinstance(number, bool):
        raise GraphError(f"{name} is a number, not {value!r}", where=user_line())
    return float(number)


_NUMBERS: dict[type, Any] = {bool: _boolean, int: _integer, float: _float}


def _tokens(value: Any) -> tuple[int, ...]:
    """Token ids as one, a list or a tensor of them; None for none."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None:
        return ()
    several = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    plain = (token.tolist() if hasattr(token, "tolist") else token for token in several)
    return tuple(dict.fromkeys(_integer("eos", token) for token in plain))


def _texts(value: Any) -> tuple[str, ...]:
    several = [value] if isinstance(value, str) else value or ()
    if not isinstance(several, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in several):
        raise GraphError(f"stop is a text or a list of texts, not {value!r}; token ids are eos=", where=user_line())
    return tuple(several)
