"""What a side of a module has beside its tensors: None is None, anything else says what it is when it is used."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from keyword import iskeyword
from typing import Any, NoReturn

from polytrace.description import MemberInfo
from polytrace.graph import Site
from polytrace.lines import user_line
from polytrace.not_values import NotAValue
from polytrace.tree import NoSuchNameError

NONE = "NoneType"


def a_class(name: str) -> str:
    """A class's name with its article."""
    return "None" if name == NONE else f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


class NoTensor(NotAValue):
    """A number, text or object that a module has among its tensors. It is there to be unpacked, and no value."""

    __slots__ = ("_info", "_site")

    def __init__(self, site: Site, info: MemberInfo) -> None:
        self._site, self._info = site, info

    def _refuse_as_value(self) -> NoReturn:
        raise NoSuchNameError(f"{self._told}: a trace has tensors alone", where=user_line())

    @property
    def _told(self) -> str:
        return f"{self._site} is {a_class(self._info.class_name)}, which {self._info.why_not}"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse_as_value()

    def __getitem__(self, index: Any) -> NoReturn:
        self._refuse_as_value()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse_as_value()

    def __iter__(self) -> Iterator[Any]:
        self._refuse_as_value()

    def __len__(self) -> int:
        self._refuse_as_value()

    def __bool__(self) -> bool:
        self._refuse_as_value()

    def __eq__(self, other: object) -> bool:
        self._refuse_as_value()

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{self._told}>"


def named(class_name: str, names: Sequence[str], members: Mapping[int | str, Any]) -> tuple[Any, ...]:
    """A namedtuple of a module's again, with None where there was no tensor. It can be pickled."""
    own = class_name if class_name.isidentifier() and not iskeyword(class_name) else "Members"
    make: Any = namedtuple  # its fields are known when it is made
    kind = make(own, names, rename=True)
    kind.__reduce__ = lambda self: (named, (own, tuple(names), dict(enumerate(self))))  # no module has its class
    made: tuple[Any, ...] = kind(*[members.get(place) for place in range(len(names))])
    return made
