"""What `.save()` makes of several tensors at once: the container that the module gave, with a value in each place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.tree import NoSuchNameError


class SavedMapping(dict[str, Any]):
    """A dict or ModelOutput: values by key, by attribute, and by place."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self:
            raise NoSuchNameError(f"what was saved has no {name!r}; it has {', '.join(self)}", where=user_line())
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (int, slice)):
            return tuple(self.values())[key]
        return super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values alone, as a ModelOutput gives them."""
        return tuple(self.values())


def container(values: Mapping[int | str, Any]) -> SavedMapping | tuple[Any, ...]:
    """The members by their keys as a mapping, by their places as a tuple; None where there was no tensor."""
    places = [key for key in values if isinstance(key, int)]
    if len(places) < len(values):
        return SavedMapping({str(key): value for key, value in values.items()})
    if not places:
        raise GraphError("there is no tensor in it to save", where=user_line())
    return tuple(values.get(place) for place in range(max(places) + 1))
