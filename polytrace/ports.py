"""One side of a module inside a trace: a tensor, or a tuple, dict or ModelOutput with tensors among its members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.description import Leaf, SiteInfo
from polytrace.errors import GraphError
from polytrace.graph import Port, Site
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.storage import is_recorded, state_of
from polytrace.tree import NoSuchLayerError, NoSuchNameError

if TYPE_CHECKING:
    from polytrace.tracing import Tracer

Key = int | str


class OpenPort:
    """A port of a module and the trace that reads and writes it."""

    __slots__ = ("info", "is_decoder_layer", "tracer")

    def __init__(self, tracer: Tracer, info: SiteInfo, is_decoder_layer: bool) -> None:
        self.tracer = tracer
        self.info = info
        self.is_decoder_layer = is_decoder_layer

    def read(self) -> Any:
        """The value of a bare tensor; the members of anything else."""
        leaf = self.leaf(())
        return self.read_leaf(leaf) if leaf is not None else Members(self, ())

    def write(self, value: Any) -> None:
        """`module.output = value`: of a tuple or dict, each of its tensors."""
        leaf = self.leaf(())
        if leaf is not None:
            self.write_leaf(leaf, value)
        else:
            self.write_members((), value)

    def leaf(self, selector: tuple[Key, ...]) -> Leaf | None:
        return next((leaf for leaf in self.info.leaves if leaf.selector == selector), None)

    def below(self, prefix: tuple[Key, ...]) -> list[Leaf]:
        """The leaves behind a selector."""
        return [leaf for leaf in self.info.leaves if leaf.selector[: len(prefix)] == prefix]

    def read_leaf(self, leaf: Leaf) -> Any:
        site = self.site(leaf.selector)
        if leaf.read_refusal is not None:
            raise GraphError(f"{site} cannot be read: {leaf.read_refusal}", where=user_line())
        state = self.tracer.recording.read(site, self.tracer.invoke_index(str(site)), leaf.dtype)
        state.is_layer_output = (
            self.is_decoder_layer and self.info.port is Port.OUTPUT and self.info.structure == "tensor"
        )
        return self.tracer.wrap(state)

    def write_leaf(self, leaf: Leaf, value: Any) -> None:
        site = self.site(leaf.selector)
        if leaf.write_refusal is not None:
            raise GraphError(f"{site} cannot be written: {leaf.write_refusal}", where=user_line())
        self.tracer.recording.write_edge(site, self.tracer.invoke_index(str(site)), value)

    def write_members(self, prefix: tuple[Key, ...], value: Any) -> None:
        """A whole tuple or dict handed back: each member that is a tensor is written, the others must be none."""
        pairs = list(value.items()) if isinstance(value, dict) else None
        if pairs is None and isinstance(value, (tuple, list)):
            pairs = list(enumerate(value))
        if pairs is None:
            names = ", ".join(str(self.site(leaf.selector)) for leaf in self.below(prefix))
            raise GraphError(f"{self.site(prefix)} is a {self.info.structure}: write one of {names}", where=user_line())
        for key, member in pairs:
            leaf = self.leaf((*prefix, key))
            if leaf is not None:
                if not self._is_unchanged(leaf, member):
                    self.write_leaf(leaf, member)
            elif isinstance(member, (tuple, list, dict)):
                self.write_members((*prefix, key), member)
            elif member is not None and not isinstance(member, Members):
                raise GraphError(f"{self.site((*prefix, key))} has no tensor to be written", where=user_line())

    def site(self, selector: tuple[Key, ...]) -> Site:
        return Site(module=self.info.module, port=self.info.port, selector=selector, visit=self.info.visit)

    def _is_unchanged(self, leaf: Leaf, member: Any) -> bool:
        """Whether a member is what was read from there: `(new, *output[1:])` writes the first only."""
        if not is_recorded(member):
            return False
        state = state_of(member)
        place = (self.site(leaf.selector), self.tracer.invoke_index("this site"))
        return state.storage.place == place and not state.steps and state.storage.version == 0


class Members:
    """A tuple, dict or ModelOutput of the model: its tensors by index, key and attribute."""

    __slots__ = ("_port", "_prefix")

    def __init__(self, port: OpenPort, prefix: tuple[Key, ...]) -> None:
        object.__setattr__(self, "_port", port)
        object.__setattr__(self, "_prefix", prefix)

    def keys(self) -> list[Key]:
        """Names or indices of the members that have tensors."""
        depth = len(self._prefix)
        return list(dict.fromkeys(leaf.selector[depth] for leaf in self._port.below(self._prefix)))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return tuple(self._member(one) for one in self._positions()[key])
        return self._member(self._key(key))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._member(self._key(name))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write(self._key(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._write(self._key(name), value)

    def __iter__(self) -> Iterator[Any]:
        keys = self.keys()
        if all(isinstance(key, str) for key in keys):
            return iter(keys)
        return (self._member(position) for position in self._positions())

    def __len__(self) -> int:
        return len(self._positions())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def __dir__(self) -> list[str]:
        return ["keys", *(key for key in self.keys() if isinstance(key, str))]

    def __repr__(self) -> str:
        return f"<{self._port.site(self._prefix)}: {self._port.info.structure} with {self._names()}>"

    def _positions(self) -> Sequence[Any]:
        """Every place that is known to exist; between tensors there may be others' (None, caches)."""
        keys = self.keys()
        numbers = [key for key in keys if isinstance(key, int)]
        return range(max(numbers) + 1) if numbers else keys

    def _key(self, key: Any) -> Key:
        """The key as the table has it: an integer into names means the one at that place."""
        keys, number = self.keys(), scalar(key)
        if key in keys:
            return key  # type: ignore[no-any-return]
        if isinstance(number, int) and not isinstance(number, bool):
            positions = self._positions()
            if -len(positions) <= number < len(positions):
                return positions[number]  # type: ignore[no-any-return]
        kind = NoSuchLayerError if isinstance(number, int) else NoSuchNameError
        raise kind(f"{self._port.site(self._prefix)} has no {key!r}; it has {self._names()}", where=user_line())

    def _member(self, key: Key) -> Any:
        selector = (*self._prefix, key)
        leaf = self._port.leaf(selector)
        if leaf is not None:
            return self._port.read_leaf(leaf)
        return Members(self._port, selector) if self._port.below(selector) else None

    def _write(self, key: Key, value: Any) -> None:
        selector = (*self._prefix, key)
        leaf = self._port.leaf(selector)
        if leaf is not None:
            self._port.write_leaf(leaf, value)
        else:
            self._port.write_members(selector, value)

    def _names(self) -> str:
        return ", ".join(repr(key) for key in self.keys()) or "no tensors"
