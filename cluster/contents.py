"""A request's constants that stand on the service: their files, and views of their bytes.

A content is a file in its owner's folder, named by its hash. A state's is named by the request only, and which it has
is known when the request's turn has come; until then it has a dtype and a shape.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from polytrace.contents import is_digest
from polytrace.errors import MissingError, NotFoundError, WireError
from polytrace.graph import Request
from polytrace.tensors import RawTensor
from polytrace.wire import decode_content


def with_contents(request: Request, folder: Path, states: Mapping[str, str] | None) -> tuple[Request, dict[str, str]]:
    """The request with its contents as views of their files, and these files by constant.

    `states`: the hashes that states have now; None: they are not known yet. Raises MissingError, NotFoundError for a
    state that has gone, and WireError when a content is not what the request says.
    """
    constants: dict[str, RawTensor] = {}
    paths: dict[str, str] = {}
    for name, raw in request.constants.items():
        digest = raw.digest
        if raw.is_here or (raw.state is not None and states is None):
            constants[name] = raw
            continue
        if raw.state is not None:
            digest = (states or {}).get(raw.state)
            if digest is None:
                raise NotFoundError(f"the state {raw.state!r} was deleted before the request's turn came")
        assert is_digest(digest)
        path = folder / str(digest)
        found = _mapped(path)
        if (found.dtype, found.shape) != (raw.dtype, raw.shape):
            told = f"{found.dtype} {list(found.shape)}, and not {raw.dtype} {list(raw.shape)}"
            raise WireError(f"the constant {name} of the request is {told}")
        constants[name], paths[name] = replace(found, digest=digest), str(path)
    return replace(request, constants=constants), paths


def _mapped(path: Path) -> RawTensor:
    """The tensor in a content's file; its bytes stay there."""
    try:
        with path.open("rb") as file:
            return decode_content(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except FileNotFoundError:
        told = f"1 contents that the request names are not on the service: {path.name[:12]}"
        raise MissingError(told) from None
