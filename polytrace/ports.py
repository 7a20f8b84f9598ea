"""One side of a module inside a trace: a tensor, or a tuple, dict or ModelOutput with tensors among its members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from polytrace import hints
from polytrace.description import MemberInfo
from polytrace.errors import GraphError
from polytrace.graph import Site
from polytrace.historic import hidden_of
from polytrace.inputs import missing_argument
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.no_tensors import NONE, NoTensor, a_class, named
from polytrace.not_values import NotAValue
from polytrace.points import DIMS
from polytrace.saved import SavedMapping, container
from polytrace.storage import is_recorded, state_of
from polytrace.tree import NoSuchLayerError, NoSuchNameError, PortTable

if TYPE_CHECKING:
    from polytrace.tracing import Tracer

Key = int | str


class OpenPort:
    """A port of a module and the trace that reads and writes it."""

    __slots__ = ("table", "tracer")

    def __init__(self, tracer: Tracer, table: PortTable) -> None:
        self.tracer = tracer
        self.table = table

    def read(self) -> Any:
        """The value of a bare tensor; the members of anything else."""
        return self.read_leaf(()) if () in self.table.leaves else Members(self, ())

    def write(self, value: Any) -> None:
        """`module.output = value`: of a tuple or dict, each of its tensors."""
        if () in self.table.leaves:
            self.write_leaf((), hidden_of(value) if self.table.is_layer_output else value)
        else:
            self.write_members((), value)

    def below(self, prefix: tuple[Key, ...]) -> list[tuple[Key, ...]]:
        """The selectors of the tensors behind a selector."""
        return [selector for selector in self.table.leaves if selector[: len(prefix)] == prefix]

    def beside(self, selector: tuple[Key, ...]) -> MemberInfo | None:
        """What is known of what stands there and is no tensor, or has a class of its own."""
        return next((member for member in self.table.info.members if member.selector == selector), None)

    def told(self, selector: tuple[Key, ...]) -> str:
        """What stands there, where it is no tensor."""
        info = self.beside(selector)
        if info is not None:
            return a_class(info.class_name)
        if not selector:
            return a_class(self.table.info.structure)
        keys = self.keys(selector)
        return "no tensor" if not keys else "a list or tuple" if isinstance(keys[0], int) else "a dict"

    def keys(self, prefix: tuple[Key, ...]) -> list[Key]:
        """Of the members behind a selector, tensors before others."""
        depth = len(prefix)
        others = [one.selector for one in self.table.info.members if one.selector[:depth] == prefix]
        return list(dict.fromkeys(one[depth] for one in (*self.below(prefix), *others) if len(one) > depth))

    def read_leaf(self, selector: tuple[Key, ...]) -> Any:
        site, leaf = self.table.leaves[selector]
        if leaf.read_refusal is not None:
            raise GraphError(f"{site} cannot be read: {leaf.read_refusal}", where=user_line())
        state = self.tracer.recording.read(site, self.tracer.invoke_index(site), leaf.dtype)
        state.is_layer_output, state.refuses_ints = self.table.is_layer_output, self.table.refuses_ints
        state.is_dropout_input = self.table.is_dropout_input
        state.dims = self.table.dims or DIMS.get(site.port.value)
        if leaf.in_place_refusal is not None and state.storage.place is not None:
            state.storage.place.in_place_refusal = leaf.in_place_refusal
        return self.tracer.wrap(state)

    def write_leaf(self, selector: tuple[Key, ...], value: Any) -> None:
        site, leaf = self.table.leaves[selector]
        if leaf.write_refusal is not None:
            raise GraphError(f"{site} cannot be written: {leaf.write_refusal}", where=user_line())
        self.tracer.recording.write_edge(site, self.tracer.invoke_index(site), value, in_place=self.table.is_stream)

    def write_members(self, prefix: tuple[Key, ...], value: Any) -> None:
        """A whole tuple or dict handed back: each member that is a tensor is written, the others must be none."""
        pairs = list(value.items()) if isinstance(value, dict) else None
        if pairs is None and isinstance(value, (tuple, list)):
            pairs = list(enumerate(value))
        if pairs is None:
            names = ", ".join(str(self.site(selector)) for selector in self.below(prefix))
            told = f"{self.site(prefix)} is {self.told(prefix)}"
            instead = f": write one of {names}" if names else ", and has no tensor to be written"
            raise GraphError(f"{told}{instead}", where=user_line())
        for key, member in pairs:
            selector = (*prefix, key)
            if selector in self.table.leaves:
                if not self._is_unchanged(selector, member):
                    self.write_leaf(selector, member)
            elif isinstance(member, (tuple, list, dict)):
                self.write_members(selector, member)
            elif member is not None and not isinstance(member, (Members, NoTensor)):
                raise GraphError(f"{self.site(selector)} has no tensor to be written", where=user_line())

    def site(self, selector: tuple[Key, ...]) -> Site:
        info = self.table.info
        return Site(module=info.module, port=info.port, selector=selector, visit=info.visit)

    def _is_unchanged(self, selector: tuple[Key, ...], member: Any) -> bool:
        """Whether a member is what was read from there: `(new, *output[1:])` writes the first only."""
        if not is_recorded(member):
            return False
        state = state_of(member)
        place, invoke = state.storage.place, self.tracer.invoke_index("this site")
        is_from_here = place is not None and (place.site, place.invoke) == (self.table.leaves[selector][0], invoke)
        return is_from_here and not state.steps and state.storage.version == 0


def plain_member(member: Any) -> Any:
    """A member that is a tuple or dict itself, as `Members.plain` has it; None for what is no tensor."""
    if isinstance(member, Members):
        return member.plain() if member._has_tensors else None
    return None if isinstance(member, NoTensor) else member


class Members(NotAValue):
    """A tuple, dict or ModelOutput of the model: its tensors by index, key and attribute."""

    __slots__ = ("_port", "_prefix")

    def __init__(self, port: OpenPort, prefix: tuple[Key, ...]) -> None:
        object.__setattr__(self, "_port", port)
        object.__setattr__(self, "_prefix", prefix)

    def plain(self) -> Any:
        """Its tensors as recorded values: a tuple with None where others' members are, or names with attributes."""
        members = {key: plain_member(self._member(key)) for key in self.keys()}
        if self._port.table.is_call and not self._prefix:
            return members.get(0, ()), members.get(1, SavedMapping())
        names = self._place_names()
        info = self._port.beside(self._prefix)
        return container(members) if info is None or not names else named(info.class_name, names, members)

    def save(self) -> Any:
        """Saves every tensor in it; returns the container with these, which after the block are what they are.

        A dict or ModelOutput gives a mapping whose keys are attributes too, a tuple gives a tuple with None where
        there is no tensor, `inputs` gives both.
        """
        from polytrace.saving import save

        return save(self.plain())

    def keys(self) -> list[Key]:
        """Names or indices of the members, those with tensors first."""
        keys: list[Key] = self._port.keys(self._prefix)
        return keys

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
        return ["keys", "save", *self._place_names(), *(key for key in self.keys() if isinstance(key, str))]

    def __repr__(self) -> str:
        told = self._port.told(self._prefix).partition(" ")[2]
        return f"<{self._port.site(self._prefix)}: {told} with {self._names()}>"

    @property
    def _has_tensors(self) -> bool:
        """Whether there is one in it, however deep."""
        return bool(self._port.below(self._prefix))

    def _place_names(self) -> tuple[str, ...]:
        """Of a namedtuple."""
        info = self._port.beside(self._prefix)
        return () if info is None else info.names

    def _positions(self) -> Sequence[Any]:
        """Every place that is known to exist; between tensors there may be others' (None, caches)."""
        keys = self.keys()
        if self._port.table.is_call and not self._prefix:
            return (0, 1)
        numbers = [key for key in keys if isinstance(key, int)]
        return range(max(numbers) + 1) if numbers else keys

    def _key(self, key: Any) -> Key:
        """The key as the table has it: an integer into names means the one at that place."""
        keys, number = self.keys(), scalar(key)
        if key in keys:
            return key  # type: ignore[no-any-return]
        if isinstance(key, str) and key in (names := self._place_names()):
            return names.index(key)
        if isinstance(number, int) and not isinstance(number, bool):
            positions = self._positions()
            if -len(positions) <= number < len(positions):
                return positions[number]  # type: ignore[no-any-return]
        if self._port.table.is_call:
            raise missing_argument(str(self._port.site(self._prefix)), key, self._prefix, self._names())
        kind = NoSuchLayerError if isinstance(number, int) else NoSuchNameError
        raise kind(f"{self._port.site(self._prefix)} has no {_shown(key)}{self._instead(key)}", where=user_line())

    def _refuse_as_value(self) -> NoReturn:
        site = self._port.site(self._prefix)
        raise GraphError(f"{site} is {self._port.told(self._prefix)}, no value{self._instead(...)}", where=user_line())

    def _instead(self, key: Any) -> str:
        """What to write instead of a key that is not there."""
        table, keys = self._port.table, self.keys()
        has_pattern = (table.info.module, "pattern") in self._port.tracer.model._index.ports
        if key == 1 and has_pattern and table.info.port.value == "output":
            return "; attention weights are `.pattern` of the module itself"
        is_of_value = hints.is_of_values(key) if isinstance(key, str) else not isinstance(key, int)
        if is_of_value and keys:
            member = f".{keys[0]}" if isinstance(keys[0], str) else f"[{keys[0]}]"
            return f": take one of its tensors first, as in `.{table.info.port.value}{member}`; it has {self._names()}"
        return f"; it has {self._names()}"

    def _member(self, key: Key) -> Any:
        selector = (*self._prefix, key)
        if selector in self._port.table.leaves:
            return self._port.read_leaf(selector)
        if self._port.keys(selector) or (self._port.table.is_call and not self._prefix):
            return Members(self._port, selector)
        info = self._port.beside(selector)
        return None if info is None or info.class_name == NONE else NoTensor(self._port.site(selector), info)

    def _write(self, key: Key, value: Any) -> None:
        selector = (*self._prefix, key)
        if selector in self._port.table.leaves:
            self._port.write_leaf(selector, value)
        else:
            self._port.write_members(selector, value)

    def _names(self) -> str:
        return ", ".join(map(repr, self._place_names() or self.keys())) or "no tensors"


def _shown(key: Any) -> str:
    """A key as the user wrote it."""
    return "[...]" if isinstance(key, (slice, tuple)) else repr(key)
