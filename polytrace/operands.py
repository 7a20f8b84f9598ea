"""The operand that a Python value is: recorded values become references, tensors and arrays constants.

Everything else is what a graph may hold as it is (numbers, indices, dtypes), checked on the user's own line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polytrace.constants import requires_gradients
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Constant, DType, Operand, Ref
from polytrace.literals import dtype_name, scalar
from polytrace.storage import is_recorded, state_of
from polytrace.tensors import VALUE_DTYPES

if TYPE_CHECKING:
    from polytrace.recording import Recording


# types of Python values that stand in a graph as they are
_PLAIN = frozenset({type(None), type(Ellipsis), bool, float, str, DType})


def operand_of(recording: Recording, value: Any, where: str, *, is_member: bool = False) -> Operand:
    """The operand that a Python value is: recorded values become references, tensors and arrays constants.

    `is_member`: it stands in a list.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value  # type: ignore[no-any-return]
    if kind is int:
        return _integer(value, where)
    if kind is tuple:
        return tuple([operand_of(recording, part, where) for part in value])
    if kind is slice and value.start is None and value.stop is None and value.step is None:
        return value  # type: ignore[no-any-return]
    if is_recorded(value):
        return Ref(recording.own_node(state_of(value), where, is_member=is_member))
    if isinstance(value, tuple):
        return tuple([operand_of(recording, part, where) for part in value])
    if isinstance(value, (list, range)):
        return [operand_of(recording, part, where, is_member=True) for part in value]
    if isinstance(value, slice):
        return slice(*[operand_of(recording, part, where) for part in (value.start, value.stop, value.step)])
    if (number := scalar(value)) is not None:
        return _integer(number, where) if isinstance(number, int) else number
    if (dtype := dtype_name(value)) is not None:
        if dtype not in VALUE_DTYPES:
            raise GraphError(f"polytrace has no dtype {dtype!r}{nearest(dtype, VALUE_DTYPES)}", where=where)
        return DType(dtype)
    name = recording.constants.add(value, where)
    if requires_gradients(value):
        return Ref(recording.gradients.leaves.add(value, name, where))
    return Ref(recording.once(Constant(name=name, where=where), name))


def _integer(number: int, where: str) -> int:
    if not -(1 << 63) <= number < 1 << 63:
        raise GraphError(f"{number} does not fit into 64 bits", where=where)
    return number
