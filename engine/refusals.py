"""The words of a refusal: which node, what torch says of it, which shapes met.

Owns turning torch's errors into a line for the user, without torch's machinery. Decides nothing but how deep operands
nest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from engine.meta import Meta
from engine.ops import DTYPE_NAMES
from polytrace.errors import GraphError
from polytrace.graph import Call, Node, Op, Operand, Read, Write

VALUES_HINT = "its shape depends on values; use torch.where or topk"

_MAX_DEPTH = 8  # of nested tuples and lists in an operand
_DATA_NEEDED = ("meta tensor", "nonzero", "data-dependent", "data dependent", "_local_scalar_dense", "output_size")


def check_depth(node: Op | Call) -> None:
    """Raises GraphError for operands that only a recursion without end would walk."""
    arguments: tuple[Operand, ...] = (*node.args, *node.kwargs.values()) if isinstance(node, Op) else node.args
    level: list[Any] = [part for part in arguments if isinstance(part, (tuple, list))]
    for _ in range(_MAX_DEPTH):
        if not level:
            return
        level = [member for part in level for member in part if isinstance(member, (tuple, list))]
    raise GraphError(f"{title(node)} has an argument nested more than {_MAX_DEPTH} deep", where=node.where)


def explain(node: Node, error: Exception, met: Sequence[Meta | tuple[Meta, ...] | None]) -> str:
    """What is wrong, in torch's words, with the shapes that met."""
    reason = _clean(str(error))
    if any(sign in str(error) for sign in _DATA_NEEDED) or isinstance(error, NotImplementedError):
        reason = VALUES_HINT
    shown = [_describe(value) for value in met[:4]]
    return f"{title(node)}: {reason}" + (f" (on {', '.join(shown)})" if shown else "")


def title(node: Node) -> str:
    """What the user called."""
    if isinstance(node, Op):
        return node.name
    if isinstance(node, Call):
        return f"calling {node.module}"
    if isinstance(node, (Read, Write)):
        return str(node.site)
    return type(node).__name__.lower()


def _describe(value: Meta | tuple[Meta, ...] | None) -> str:
    if isinstance(value, Meta):
        return f"{DTYPE_NAMES.get(value.dtype, str(value.dtype))}{list(value.shape)}"
    return f"{len(value)} values" if value is not None else "nothing"


def _clean(message: str) -> str:
    """torch's reason in one line, without its machinery."""
    first = message.strip().split("\n")[0].strip()
    first = re.sub(r"\s*\(?[Tt]his (error )?is (a )?bug.*|Exception raised from.*|on (the )?meta device", "", first)
    first = first.replace("device='meta', ", "").replace(", device='meta'", "")
    return first[:300].rstrip(" :") or "its operands do not fit"
