"""nnsight's keywords that mean little or nothing here: taken, so that its programs run. Unknown ones are refused.

What each means: `remote`, `dispatch`, `low_cpu_mem_usage`: nothing, for where a model runs is decided by
`load` or `connect`. `attn_implementation`: nothing, for attention is polytrace's own and patterns can always be read.
`device_map`: a device, what means the default ("auto"), or how a model that is called as it is lies over several
(`polytrace.device_maps`); a language model's parts are all on one. `torch_dtype`: another name of `dtype`. `backend`,
`invoker_args`, `invoker_kwargs`: empty only. `trust_remote_code`: False only, for no model's own code is run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polytrace.device_maps import DeviceMap, checked_device_map, num_gpus
from polytrace.errors import GraphError, UserError
from polytrace.grammar import nearest
from polytrace.lines import user_line
from polytrace.literals import dtype_name


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A keyword of nnsight's: which values of it can be honoured, and what is said of the others."""

    accepts: Callable[[Any], bool]
    told: str = ""


def _anything(value: Any) -> bool:
    return True


_NOTHING = _Foreign(_anything)
_UNTRUSTED = _Foreign(lambda value: not value, "no code that comes with a model is run: use a family of transformers'")
_ON_LOAD: Mapping[str, _Foreign] = {
    "remote": _NOTHING,
    "dispatch": _NOTHING,
    "low_cpu_mem_usage": _NOTHING,
    "attn_implementation": _NOTHING,
    "trust_remote_code": _UNTRUSTED,
}
_ON_TRACE: Mapping[str, _Foreign] = {
    "remote": _NOTHING,
    "trace": _Foreign(bool, "a block is always a trace: save model.output in it"),
    "backend": _Foreign(lambda value: value is None, "what runs a trace is the model's: polytrace.load or connect"),
    "invoker_args": _Foreign(lambda value: not value, "give the prompts to model.trace(prompts) or tracer.invoke"),
    "invoker_kwargs": _Foreign(lambda value: not value, "give the prompts to model.trace(prompts) or tracer.invoke"),
}


def check_load_keywords(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises GraphError for a keyword of `polytrace.load` or `connect` that is unknown, or asks for what cannot be."""
    _check(f"polytrace.{function.__name__}", function, given, _ON_LOAD)


def check_trace_keywords(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """The same for a trace or a scan."""
    _check(f"model.{function.__name__}", function, given, _ON_TRACE)


def taken_keywords(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not nnsight's own, which are checked as for a trace."""
    check_trace_keywords(function, {name: value for name, value in given.items() if name in _ON_TRACE})
    return {name: value for name, value in given.items() if name not in _ON_TRACE}


def chosen_dtype(dtype: Any, torch_dtype: Any) -> str:
    """`dtype` and `torch_dtype` are one keyword: a name, or torch's own object."""
    if torch_dtype is None:
        return _named(dtype)
    if dtype != "auto" and _named(dtype) != _named(torch_dtype):
        raise GraphError(f"dtype is {dtype} and torch_dtype {torch_dtype}: give one of them", where=user_line())
    return _named(torch_dtype)


def chosen_places(device: str | None, device_map: Any) -> tuple[str | None, DeviceMap | None]:
    """The device that `device_map` names, or how it places the parts of a model, which others check. GraphError for
    what is neither, and for a `device` that is another one.
    """
    if device_map is None:
        return device, None
    if (named := _device(device_map)) is not None:
        return _agreed(device, named), None
    try:
        places = checked_device_map(device_map)
    except UserError as error:
        raise GraphError(error.message, where=user_line()) from None
    if isinstance(places, str):
        return device, places
    one = _of_all(places)
    agreed = _agreed(device, one or ("cuda" if num_gpus(places) else "cpu"))
    return (agreed, None) if one is not None and "" in places else (device, places)


def chosen_device(device: str | None, device_map: Any) -> str | None:
    """The one device that `device_map` names, or puts all parts on; None where it leaves the choice."""
    device, places = chosen_places(device, device_map)
    if places is None or places == "auto":
        return device
    one = None if isinstance(places, str) else _of_all(places)
    if one is None:
        told = f"device_map is {places!r}, and " if isinstance(places, str) else ""
        raise GraphError(
            f"{told}polytrace.load runs a language model on one device: a service splits it (polytrace serve --stages "
            '--ranks), and offload_gib= keeps weights in the host\'s memory; here device_map is a device or "auto"',
            where=user_line(),
        )
    return one


def _of_all(places: Mapping[str, str | int]) -> str | None:
    """The device that every part is on; None where they are on several, or on the disk."""
    every = set(places.values())
    return _device(every.pop()) if len(every) == 1 else None


def _agreed(device: str | None, named: str) -> str:
    """What `device_map` names: `device` beside it says the same, or its kind ("cuda")."""
    if device is not None and str(device) not in (named, named.partition(":")[0]):
        raise GraphError(f"device is {device}, and device_map is of {named}: give one of them", where=user_line())
    return named


def _device(given: Any) -> str | None:
    """A device as accelerate has it, where a number is a GPU's; None for what is none."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return f"cuda:{given}"
    is_text = isinstance(given, str) or type(given).__name__ == "device"  # torch's own
    return str(given) if is_text and re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d{1,4})?", str(given), re.ASCII) else None


def _named(dtype: Any) -> str:
    name = dtype_name(dtype) if not isinstance(dtype, str) else dtype.removeprefix("torch.")
    if name is None:
        raise GraphError(f"a dtype is a name or torch's own, not a {type(dtype).__name__}", where=user_line())
    return name


def _check(
    called: str, function: Callable[..., Any], given: Mapping[str, Any], foreign: Mapping[str, _Foreign]
) -> None:
    for name, value in given.items():
        if name not in foreign:
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            own = [key for key, one in inspect.signature(function).parameters.items() if one.kind in kinds]
            known = [key for key in own if key != "self"]
            close = nearest(name, [*known, *foreign]) or f"; it has {', '.join(known)}"
            raise GraphError(f"{called} has no keyword {name!r}{close}", where=user_line())
        if not foreign[name].accepts(value):
            raise GraphError(f"{called}({name}={value!r}): {foreign[name].told}", where=user_line())
