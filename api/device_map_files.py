"""Device maps as a command line names them: a name of accelerate's, or a file with a JSON object."""

from __future__ import annotations

import json
from pathlib import Path

from polytrace.device_maps import NAMES, DeviceMap, checked_device_map
from polytrace.errors import UserError

_MAX_BYTES = 4 << 20


def read_device_map(given: str) -> DeviceMap:
    """The device map. UserError when there is none, or none of that form."""
    if given in NAMES:
        return given
    file = Path(given)
    if not file.is_file():
        raise UserError(f"--device-map {given} is neither {', '.join(NAMES)} nor a file with a JSON object in it")
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise UserError(f"{given} has {file.stat().st_size} bytes; a device map has at most {_MAX_BYTES}")
        return checked_device_map(json.loads(file.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{given} cannot be read as JSON: {error}") from error
