"""What a call of a model is given, as data: numbers, texts and tensors, in tuples, lists and dicts.

Owns the *structure* of arguments, in which a tensor is its dtype and shape: two calls of one structure visit the same
sites with the same shapes. How Python arguments become data is `polytrace.calling`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from polytrace.graph import Given, Inputs
from polytrace.tensors import RawTensor

MAX_DEPTH = 8  # of lists, tuples and dicts in each other


def given_names(inputs: Inputs | None) -> Iterator[str]:
    """The constants among the arguments of a call."""
    if inputs is not None:
        yield from _names([inputs.args, inputs.kwargs])


def structure_of(inputs: Inputs, constants: Mapping[str, RawTensor]) -> Inputs:
    """The arguments with dtype and shape in the place of tensors: the name of a `Given` says both.

    What the sites of a call follow from, and nothing else.
    """

    def form(given: Given) -> Given:
        raw = constants[given.name]
        return Given(json.dumps([raw.dtype, *raw.shape]))

    return with_given(inputs, form)


def with_given(inputs: Inputs, put: Callable[[Given], Any]) -> Inputs:
    """The arguments with something else in the place of each tensor."""
    return replace(
        inputs,
        args=tuple([_mapped(value, put) for value in inputs.args]),
        kwargs={name: _mapped(value, put) for name, value in inputs.kwargs.items()},
    )


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Given):
        yield value.name
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _names(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _names(part)


def _mapped(value: Any, put: Callable[[Given], Any]) -> Any:
    if isinstance(value, Given):
        return put(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, put) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(part, put) for part in value])
    return value
