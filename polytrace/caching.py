"""`tracer.cache()`: outputs (and inputs) of all modules, or of chosen ones, reduced on the service.

Its reads stand at the end of their invoke, so that they see every change that the program makes, as nnsight's do. All
of them have the line of the call, so that hundreds of modules are one loop on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.lines import user_line
from polytrace.ports import Key
from polytrace.saved import SavedMapping
from polytrace.saving import save_members
from polytrace.storage import is_recorded
from polytrace.tree import NoSuchNameError, PortTable, Table
from polytrace.values import shape_of

if TYPE_CHECKING:
    from polytrace.modules import Module
    from polytrace.tracing import Tracer

Function = Callable[[Any], Any]
_OVER_TOKENS = ("mean", "sum", "max")
_ROOT = "model"  # the root's name in nnsight


class NotCachedError(GraphError, KeyError):
    """Also a KeyError, as of any mapping."""


class Entry:
    """What is kept of one module."""

    def __init__(self) -> None:
        self.output: Any = None  # a tensor, or a tuple or dict of them as the module returned
        self.input: Any = None  # the first argument, with `include_inputs=True`

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """(args, kwargs) with the first argument alone; None where none is kept."""
        return None if self.input is None else ((self.input,), {})

    def __repr__(self) -> str:
        return f"Entry(output={self.output!r}, input={self.input!r})"


class Cache:
    """Entries by path: `cache["model.layers.0"].output`, `cache.model.layers[0].output`; aliases mean what they mean.

    nnsight's paths begin with "model", the root's name there: it may stand in front here, too, where it leads nowhere.
    `refused`: paths of what could not be read, with the reason. Entries are there, with data, when the block has ended.
    """

    def __init__(self, table: Table, path: str, entries: dict[str, Entry], refused: dict[str, str]) -> None:
        self._table = table
        self._path = path  # that attributes start from
        self._entries = entries
        self.refused = refused

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, int):
            names = self._table.children.get(self._path, ())
            if not -len(names) <= key < len(names):
                raise IndexError(f"{self._path or 'the model'} has {len(names)} children")
            return self._below(names[key])
        for start in ("", self._path):
            if (path := _native(self._table, key, start)) in self._entries:
                return self._entries[path]
        if not self._entries:
            raise NotCachedError("entries are in the cache when the block has ended", where=user_line())
        known = list(self._entries)
        raise NotCachedError(f"{key}: not in this cache{nearest(key, known) or f' of {len(known)}'}", where=user_line())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in ("output", "input", "inputs"):
            return getattr(self[self._path], name)
        return self._below(name)

    def keys(self) -> list[str]:
        """Paths of the modules, in the model's order; below where attributes led."""
        return [path for path in self._entries if _is_below(path, self._path)]

    def items(self) -> list[tuple[str, Entry]]:
        return [(path, self._entries[path]) for path in self.keys()]

    def values(self) -> list[Entry]:
        return [entry for _, entry in self.items()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _native(self._table, key) in self._entries

    def __repr__(self) -> str:
        return f"<cache of {len(self)} modules, {len(self.refused)} refused>"

    def _below(self, name: str) -> Cache:
        if name == _ROOT and not self._path and name not in self._table.children.get("", ()):
            return self  # what is below the module of that standard name is found from here too
        path = self._table.native(name, self._path)
        for way in (path, self._table.native(f"{_ROOT}.{name}", self._path)):
            if any(_is_below(known, way) for known in self._entries):
                return Cache(self._table, way, self._entries, self.refused)
        if name == _ROOT:
            return self
        raise NoSuchNameError(f"nothing of {path} is in this cache", where=user_line())


class CacheRequest:
    """A cache that waits for the end of its invoke."""

    def __init__(
        self,
        tracer: Tracer,
        modules: Iterable[Module | str] | None,
        *,
        include_output: bool,
        include_inputs: bool,
        select: Function | None,
        reduce: Function | str | None,
        dtype: Any,
    ) -> None:
        self.where = user_line()
        self.invoke = tracer.invoke_index("a cache")
        self._tracer = tracer
        self._table = tracer.model._index
        self._is_all = modules is None
        self._paths = self._chosen(modules)
        self._ports = [name for name, is_wanted in (("output", include_output), ("input", include_inputs)) if is_wanted]
        if isinstance(reduce, str) and reduce not in _OVER_TOKENS:
            known = ", ".join(map(repr, _OVER_TOKENS))
            raise GraphError(f"a cache reduces by a function or by {known}, not by {reduce!r}", where=self.where)
        self._select, self._reduce, self._dtype = select, reduce, dtype
        self.cache = Cache(self._table, "", {}, {})

    def fill(self) -> None:
        """Reads what the cache is of, and saves it. For the end of the invoke."""
        for path in self._paths:
            found = Entry()
            for port in self._ports:
                table = self._table.ports.get((path, port))
                if table is not None:
                    setattr(found, port, self._members(table))
            if found.output is not None or found.input is not None:
                self.cache._entries[path] = found
                save_members([found.output, found.input])

    def _chosen(self, modules: Iterable[Module | str] | None) -> Sequence[str]:
        if modules is None:
            return list(self._table.modules)
        paths = [_native(self._table, one) if isinstance(one, str) else one._path for one in modules]
        for path in paths:
            info = self._table.module(path)
            if (path, "output") not in self._table.ports and (path, "input") not in self._table.ports:
                kind = "is a list of modules" if info.is_list else "is not called by this model's forward"
                raise GraphError(f"there is nothing of {path} to keep: it {kind}", where=self.where)
        return paths

    def _members(self, table: PortTable) -> Any:
        """The port's tensors in its own structure, each as far as it is kept."""
        made: dict[tuple[Key, ...], Any] = {}
        for selector, (site, leaf) in table.leaves.items():
            if leaf.read_refusal is not None:
                self.cache.refused[str(site)] = leaf.read_refusal
                continue
            try:
                state = self._tracer.recording.read(site, self.invoke, leaf.dtype, self.where)
                state.is_layer_output, state.refuses_ints = table.is_layer_output, table.refuses_ints
                made[selector] = self._part(str(site), self._tracer.wrap(state))
            except GraphError as error:
                if not self._is_all:
                    raise
                self.cache.refused[str(site)] = error.message
        return _built(made, ())

    def _part(self, name: str, value: Any) -> Any:
        try:
            if self._select is not None:
                value = self._select(value)
            if self._reduce is not None:
                reduce = self._reduce
                value = self._over_tokens(value, reduce) if isinstance(reduce, str) else reduce(value)
            if self._dtype is not None and is_recorded(value):
                value = value.to(self._dtype)
            if hasattr(value, "__torch_function__") and is_recorded(value):
                shape_of(value)  # found out here, without asking anyone: what does not fit some module is told with it
            return value
        except GraphError as error:
            raise GraphError(f"the cache's part of {name}: {error.message}", where=error.where) from error

    def _over_tokens(self, value: Any, how: str) -> Any:
        """The mean, sum or maximum over the tokens of each prompt, pads not counted: `[sequences, *tail]`."""
        lengths = self._tracer.lengths_of(self.invoke)
        shape = shape_of(value).shape
        if shape[:2] != (len(lengths), max(lengths)):
            raise GraphError(
                f"{how!r} runs over the tokens of [sequences, tokens, ...] = {[len(lengths), max(lengths)]}; this is "
                f"{list(shape)}",
                where=self.where,
            )
        if len(set(lengths)) == 1:
            return value.amax(1) if how == "max" else getattr(value, how)(1)
        mask = self._tracer.mask
        for _ in shape[2:]:
            mask = mask[..., None]
        if how == "max":
            return value.masked_fill(~mask, float("-inf")).amax(1)
        total = (value * mask).sum(1)
        return total if how == "sum" else total / mask.sum(1)


def _built(made: dict[tuple[Key, ...], Any], prefix: tuple[Key, ...]) -> Any:
    """Tensors by the way to them, as a tuple with None in other places, or as names; None where there are none."""
    if prefix in made:
        return made[prefix]
    keys = list(dict.fromkeys(way[len(prefix)] for way in made if way[: len(prefix)] == prefix))
    if not keys:
        return None
    if all(isinstance(key, str) for key in keys):
        return SavedMapping({str(key): _built(made, (*prefix, key)) for key in keys})
    numbers = [key for key in keys if isinstance(key, int)]
    return tuple(_built(made, (*prefix, place)) for place in range(max(numbers) + 1))


def _native(table: Table, path: str, start: str = "") -> str:
    """The native path, also of one that begins with nnsight's name of the root."""
    found = table.native(path, start)
    if found not in table.modules and (path == _ROOT or path.startswith(f"{_ROOT}.")):
        below = table.native(path.removeprefix(_ROOT).removeprefix("."), start)
        return below if below in table.modules else found
    return found


def _is_below(path: str, start: str) -> bool:
    return not start or path == start or path.startswith(f"{start}.")
