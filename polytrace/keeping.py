"""What outlives a request: kept values and named states, as the user holds them.

`value.keep(...)` gives a `Kept`, `model.state(...)` a `NamedState`. Both stand for a tensor that a keeper has: the
service over HTTP (`polytrace.http_keeper`), or this process (`engine.keeping`). Knows nothing of how they are stored.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.constants import Constants
from polytrace.contents import check_name, digest_of
from polytrace.errors import GraphError
from polytrace.graph import KeptSave
from polytrace.keepers import Keeper, KeptEntry
from polytrace.kinds import value_kind
from polytrace.lines import user_line
from polytrace.storage import is_recorded, state_of
from polytrace.tensors import RawTensor
from polytrace.tracing import open_trace
from polytrace.values import shape_of

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.storage import State


def keeper_of(model: Model) -> Keeper:
    """Who keeps a model's values. Raises GraphError where nobody does."""
    keeper = getattr(model.backend, "keeper", None)
    if keeper is None:
        raise GraphError("nothing can be kept here", where=user_line())
    return keeper  # type: ignore[no-any-return]


# --- leaving something behind


@dataclass(frozen=True, slots=True)
class Leaving:
    """A value that an open trace leaves on the service when it ends."""

    state: State
    keep: KeptSave
    where: str
    handle: Kept | None  # None: a state's new content


def keep(value: Any, name: str | None, ttl: float | None) -> Kept:
    """See `Recorded.keep`."""
    where = user_line()
    chosen = f"kept-{secrets.token_hex(6)}" if name is None else check_name(name, where)
    if ttl is not None and not (type(ttl) in (int, float) and 0 < ttl < 1 << 40):
        raise GraphError(f"ttl is {ttl!r}; it is a number of seconds, more than 0", where=where)
    handle = Kept(chosen, None)
    _leave(value, chosen, ttl, handle, where)
    return handle


def _leave(value: Any, name: str, ttl: float | None, handle: Kept | None, where: str) -> None:
    recording = state_of(value).recording
    recording.node_of(state_of(value))  # of a trace that is open
    is_state = handle is None
    for other in recording.leaving:
        if other.keep.name == name and other.keep.is_state is is_state:
            done = "updated" if is_state else "kept"
            raise GraphError(f"{name!r} is {done} already in this trace, at {other.where}", where=where)
    told = KeptSave(save=f"kept {len(recording.leaving)}", name=name, is_state=is_state, ttl_s=ttl)
    recording.leaving.append(Leaving(state_of(value), told, where, handle))


def land(model: Model, leaving: Sequence[Leaving], request: str) -> None:
    """The request has ended well: its handles stand for what it left."""
    handles = {each.keep.name: each.handle for each in leaving if each.handle is not None}
    if not handles:
        return
    keeper = keeper_of(model)
    for entry in keeper.entries(is_state=False, request=request):
        if (handle := handles.get(entry.name)) is not None:
            handle._land(keeper, entry)


# --- what is there


class Kept:
    """A tensor that stays on the service. In a trace it is used like a tensor, and its bytes do not come here.

    A handle means the content that it was made for. When another value is kept under its name it goes on meaning that,
    and the content may be purged.
    """

    __array_ufunc__ = None  # an array of numpy on the left leaves the operator to this side

    def __init__(self, name: str, keeper: Keeper | None, entry: KeptEntry | None = None) -> None:
        self.name = name
        self._keeper = keeper
        self._entry = entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self._landed()[1].shape

    @property
    def dtype(self) -> Any:
        """torch's dtype, or numpy's where torch is not installed."""
        return _dtype(self._landed()[1].dtype)

    @property
    def bytes(self) -> int:
        """What it takes of its owner's quota."""
        return self._landed()[1].num_bytes

    @property
    def expires(self) -> float | None:
        """When it is purged, in seconds since the epoch; None: when it is deleted."""
        return self._landed()[1].expires

    def fetch(self) -> Any:
        """Its data, as a tensor or array."""
        keeper, entry = self._landed()
        return value_kind().decode(keeper.fetch(entry.name, entry.digest, is_state=False))

    def delete(self) -> None:
        """Takes it from the service. Requests that are waiting and use it still have it."""
        self._landed()[0].delete(self.name, is_state=False)

    @property
    def value(self) -> Any:
        """It as a value of the trace that is open. Rarely needed: operators and torch functions take it as it is."""
        return _recorded(self, f"the kept value {self.name!r}")

    @property
    def kept_tensor(self) -> RawTensor:
        """It as a constant (`polytrace.constants`)."""
        keeper, entry = self._landed()
        return keeper.tensor(entry)

    def __repr__(self) -> str:
        about = "not there yet" if self._entry is None else f"{self._entry.dtype} {list(self._entry.shape)}"
        return f"<kept {self.name!r}: {about}>"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*recorded(args), **{key: recorded(value) for key, value in (kwargs or {}).items()})

    def __getattr__(self, name: str) -> Any:
        """A tensor's methods, in a trace."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.value, name)

    def __getitem__(self, index: Any) -> Any:
        return self.value[index]

    def __bool__(self) -> bool:
        return bool(self.value)  # which looks, or says why it cannot

    def __float__(self) -> float:
        return float(self.value)

    def __int__(self) -> int:
        return int(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __eq__(self, other: object) -> Any:
        """In a trace by element, as a tensor's."""
        return self is other if open_trace() is None else self.value == recorded(other)

    def __ne__(self, other: object) -> Any:
        return self is not other if open_trace() is None else self.value != recorded(other)

    __hash__ = object.__hash__

    def _land(self, keeper: Keeper, entry: KeptEntry) -> None:
        self._keeper, self._entry = keeper, entry

    def _landed(self) -> tuple[Keeper, KeptEntry]:
        if self._keeper is None or self._entry is None:
            told = (
                "it is there when its trace, or the session around it, has ended well and nobody has kept another "
                "value under its name; until then use the value that was kept"
            )
            raise GraphError(f"the kept value {self.name!r} is not on the service: {told}", where=user_line())
        return self._keeper, self._entry


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Kept, *others: Any) -> Any:
        return getattr(self.value, name)(*others)

    return apply


_TWO = ("and", "or", "xor", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
for _name in (*_TWO, *(f"r{name}" for name in _TWO), "neg", "abs", "invert", "lt", "le", "gt", "ge"):
    setattr(Kept, f"__{_name}__", _operator(f"__{_name}__"))


class NamedState:
    """A named tensor on the service that requests change one after another.

    A request that reads or updates it sees what the one submitted before it left, whoever submitted that. A request
    that fails changes nothing.
    """

    def __init__(self, name: str, keeper: Keeper, entry: KeptEntry) -> None:
        self.name = name
        self._keeper = keeper
        self._form = entry  # dtype and shape never change

    @property
    def shape(self) -> tuple[int, ...]:
        return self._form.shape

    @property
    def dtype(self) -> Any:
        """torch's dtype, or numpy's where torch is not installed."""
        return _dtype(self._form.dtype)

    @property
    def version(self) -> int:
        """How many contents it has had, the first one included."""
        return self._keeper.entry(self.name, is_state=True).version

    @property
    def value(self) -> Any:
        """Its content when this request begins, as a value of the trace that is open."""
        return _recorded(self, f"the state {self.name!r}")

    def update(self, value: Any) -> None:
        """Its content from the end of this request on: a value of its shape and dtype. Once in a trace."""
        where = user_line()
        if not is_recorded(value):
            value = _recorded(value, f"an update of the state {self.name!r}")
        found = shape_of(value)
        if (found.shape, found.dtype) != (self._form.shape, self._form.dtype):
            raise GraphError(
                f"the state {self.name!r} is {self._form.dtype} {list(self._form.shape)}, and this value "
                f"{found.dtype} {list(found.shape)}: an update has the state's dtype and shape",
                where=where,
            )
        _leave(value, self.name, None, None, where)

    def fetch(self) -> Any:
        """Its content now, as a tensor or array."""
        return value_kind().decode(self._keeper.fetch(self.name, "", is_state=True))

    def delete(self) -> None:
        """Takes it from the service. Requests that wait and use it fail."""
        self._keeper.delete(self.name, is_state=True)

    @property
    def kept_tensor(self) -> RawTensor:
        """It as a constant (`polytrace.constants`)."""
        return RawTensor(dtype=self._form.dtype, shape=self._form.shape, data=memoryview(b""), state=self.name)

    def __repr__(self) -> str:
        return f"<state {self.name!r}: {self._form.dtype} {list(self._form.shape)}>"


def kept(model: Model, name: str | None) -> Any:
    """See `Model.kept`."""
    keeper = keeper_of(model)
    if name is None:
        return [Kept(entry.name, keeper, entry) for entry in keeper.entries(is_state=False)]
    return Kept(name, keeper, keeper.entry(check_name(name, user_line()), is_state=False))


def states(model: Model) -> list[NamedState]:
    """See `Model.states`."""
    keeper = keeper_of(model)
    return [NamedState(entry.name, keeper, entry) for entry in keeper.entries(is_state=True)]


def named_state(model: Model, name: str, init: Any) -> NamedState:
    """See `Model.state`."""
    where = user_line()
    keeper = keeper_of(model)
    check_name(name, where)
    if init is None:
        return NamedState(name, keeper, keeper.entry(name, is_state=True))
    first = content_of(init, where)
    entry = keeper.begin_state(name, first)
    if (entry.dtype, entry.shape) != (first.dtype, first.shape):
        told = f"the state {name!r} is there already, {entry.dtype} {list(entry.shape)}"
        raise GraphError(f"{told}; init is {first.dtype} {list(first.shape)}: choose another name", where=where)
    return NamedState(name, keeper, entry)


def content_of(value: Any, where: str) -> RawTensor:
    """A tensor, array, number or kept value as a content with its hash."""
    if isinstance(value, (bool, int, float)):
        import numpy as np

        value = np.asarray(value, np.float32 if isinstance(value, float) else None)
    constants = Constants()
    raw = constants.tensors[constants.add(value, where)]
    digest = raw.digest or digest_of(raw.dtype, raw.shape, raw.data)
    return RawTensor(dtype=raw.dtype, shape=raw.shape, data=raw.data, digest=digest)


def _recorded(value: Any, what: str) -> Any:
    """Something of the user's as a value of the open trace."""
    tracer = open_trace()
    if tracer is None:
        raise GraphError(f"{what} has data at the service only: use it in a trace, or fetch() it", where=user_line())
    return tracer.wrap(tracer.recording.constant(value))


def recorded(arg: Any) -> Any:
    """What is kept among (nested) arguments as values of the open trace, the rest as it is."""
    if isinstance(arg, Kept):
        return arg.value
    return type(arg)(recorded(part) for part in arg) if type(arg) in (tuple, list) else arg


def _dtype(name: str) -> Any:
    try:
        import torch
    except ImportError:
        import numpy as np

        return np.dtype(name) if name != "bfloat16" else name
    return getattr(torch, name)
