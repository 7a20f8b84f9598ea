"""Where the parts of a model lie that is called as it is: a name of accelerate's, or a device for each of its modules.

Owns the form that a device map has, checked before anybody looks at a model. Which modules a model has, and how many
GPUs there are, is for others to say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from polytrace.errors import UserError

# A name: the library places the parts. Else: path of a module -> "cpu", "disk" or the number of a GPU.
DeviceMap = str | Mapping[str, str | int]

NAMES = ("auto", "balanced", "balanced_low_0", "sequential")
MAX_ENTRIES = 4096
_MAX_PATH = 200  # characters of a module's path
_MAX_GPU = 63
_MAX_SHOWN = 1 << 63
_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)
_FORMS = (
    f'a device map is one of {", ".join(NAMES)}, or a mapping such as {{"vit.embeddings": 0, "vit.layers.0": "cpu"}}'
)


def checked_device_map(given: Any) -> DeviceMap:
    """A device map in its one form: GPUs are numbers. UserError says what is wrong and what to write."""
    if isinstance(given, str):
        if given not in NAMES:
            raise UserError(f"{_brief(given)} is no device map: {_FORMS}")
        return given
    if not isinstance(given, Mapping):
        raise UserError(f"a {type(given).__name__} is no device map: {_FORMS}")
    if not given:
        raise UserError(f"the device map is empty: {_FORMS}")
    if len(given) > MAX_ENTRIES:
        raise UserError(f"the device map has {len(given)} entries; it has at most {MAX_ENTRIES}")
    places = {_path(path): _place(path, device) for path, device in given.items()}
    for path in places:
        above = _named_above(path, places)
        if above is not None:
            raise UserError(
                f"the device map places {above or 'the whole model'} and {path}, which is a part of it: "
                f"name the other parts of {above or 'the model'} in its place"
            )
    return places


def num_gpus(device_map: DeviceMap) -> int | None:
    """How many GPUs a mapping needs there to be, 0 for none; None of a name, which takes those that there are."""
    if isinstance(device_map, str):
        return None
    return 1 + max((place for place in device_map.values() if isinstance(place, int)), default=-1)


def _path(given: Any) -> str:
    if not isinstance(given, str) or len(given) > _MAX_PATH or (given and not _PATH.fullmatch(given)):
        raise UserError(
            f'the device map places {_brief(given)}: paths of modules such as "vit.layers.0" are placed, "" is all'
        )
    return given


def _place(path: str, given: Any) -> str | int:
    told = f"the device map puts {path or 'the model'} on {_brief(given)}"
    if isinstance(given, int) and not isinstance(given, bool):
        number = given
    else:
        text = str(given) if type(given).__name__ == "device" else given  # torch's own
        if not isinstance(text, str):
            raise UserError(f'{told}: a device is "cpu", "disk", or the number of a GPU')
        if text in ("cpu", "disk"):
            return text
        found = re.fullmatch(r"cuda(?::(\d{1,4}))?", text, re.ASCII)
        if found is None:
            raise UserError(f'{told}: a device is "cpu", "disk", or the number of a GPU (1 is "cuda:1")')
        number = int(found[1] or 0)
    if not 0 <= number <= _MAX_GPU:
        raise UserError(f"{told}: GPUs have the numbers 0 to {_MAX_GPU}")
    return number


def _named_above(path: str, places: Mapping[str, str | int]) -> str | None:
    """What is placed that a part belongs to, if anything is."""
    if path and "" in places:
        return ""
    parts = path.split(".")
    above = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((one for one in above if one in places), None)


def _brief(value: Any) -> str:
    """A value from outside, short enough for a message."""
    if isinstance(value, int) and abs(value) > _MAX_SHOWN:
        return "a very large number"
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
