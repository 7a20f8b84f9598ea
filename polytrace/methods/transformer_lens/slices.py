"""TransformerLens's way to say which places of a dimension are meant."""

from __future__ import annotations

from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line


def taken(tensor: Any, places: Any, dim: int) -> Any:
    """The places of a dimension: an int drops it; a tuple is a slice, `(5,)`, `(1, 5)`, `(1, 5, 2)`; a slice; a list
    or tensor of numbers; None: all. Works on recorded values too. Raises GraphError for anything else.
    """
    if places is None:
        return tensor
    if isinstance(places, tuple):
        places = slice(*places)
    elif hasattr(places, "tolist"):
        places = places.tolist()
    if isinstance(places, bool) or not isinstance(places, (int, slice, list)):
        raise GraphError(
            f"places are an int, (stop,), (start, stop), (start, stop, step), a slice or a list, not {places!r}",
            where=user_line(),
        )
    index: list[Any] = [slice(None)] * tensor.ndim
    index[dim] = places
    return tensor[tuple(index)]
