"""`module.source`: the text of a module's forward, and every call in it as a site, as nnsight has it.

`print(module.source)` shows the names beside the lines. An operation has `.output`, `.input` (its first argument),
`.inputs` (args and kwargs) and, where it calls a function of the model's own or a module, a `.source` itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from polytrace.description import SourceCode
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Port, Site
from polytrace.lines import user_line
from polytrace.not_values import NotAValue
from polytrace.ports import Members, OpenPort
from polytrace.sources import WORD, operation_path
from polytrace.tree import NoSuchNameError, PortTable, join

if TYPE_CHECKING:
    from polytrace.model import Model

_SELF = "self_"


class Source:
    """The operations of a function: of a module's forward, or of what an operation of it calls."""

    _model: Model
    _module: str
    _way: str
    _code: SourceCode

    def __init__(self, model: Model, module: str, way: str) -> None:
        sources = model._index.sources
        code = sources.code(module, way)
        if code is None:
            path = operation_path(module, way) if way else module or "the model"
            raise GraphError(f"{path} has no source: {sources.why_no_code(module, way)}", where=user_line())
        self.__dict__.update(_model=model, _module=module, _way=way, _code=code)

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__"):
            raise AttributeError(name)
        names = list(self)
        # researchers leave out `self` where it is clear what is meant
        found = next((one for one in (name, _SELF + name) if one in names), None)
        if found is None:
            close = nearest(name, [*names, *(one.removeprefix(_SELF) for one in names)])
            told = close or f"; it has {', '.join(names) or 'none'}"
            raise NoSuchNameError(f"{self._code.name} has no operation {name!r}{told}", where=user_line())
        return Operation(self._model, self._module, f"{self._way}.{WORD}.{found}" if self._way else found)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise GraphError(f"set {name}.output or {name}.input: an operation itself stays as it is", where=user_line())

    def __iter__(self) -> Iterator[str]:
        """The operations' names, in the order of evaluation."""
        return (name for name, _ in self._code.operations)

    def __len__(self) -> int:
        return len(self._code.operations)

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted(self)

    def __repr__(self) -> str:
        return draw_code(self._code)


class Operation(NotAValue):
    """One call in a forward. Outside of a trace it can be looked at; inside, its values are recorded."""

    _model: Model
    _module: str
    _way: str

    def __init__(self, model: Model, module: str, way: str) -> None:
        self.__dict__.update(_model=model, _module=module, _way=way)

    @property
    def output(self) -> Any:
        """What the call returned: a recorded value, or its members."""
        return self._port(Port.OUTPUT).read()

    @property
    def inputs(self) -> Any:
        """All arguments as (args, kwargs): `.inputs[0][1]`, `.inputs[1]["scaling"]`; those that hold tensors."""
        return self._port(Port.INPUTS).read()

    @property
    def input(self) -> Any:
        """The first positional argument, else the first keyword argument."""
        port, selector = self._first_argument()
        return port.read_leaf(selector) if selector in port.table.leaves else Members(port, selector)

    @property
    def source(self) -> Source:
        """The function that is called, when it is one of the model's own; of a module, that module's forward."""
        info = self._model._index.sources.of(self._module)
        inner = None if info is None else info.calls.get(self._way)
        if inner is not None:
            return Source(self._model, join(self._module, inner), "")
        return Source(self._model, self._module, self._way)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "output":
            self._port(Port.OUTPUT).write(value)
        elif name == "inputs":
            self._port(Port.INPUTS).write(value)
        elif name == "input":
            port, selector = self._first_argument()
            if selector in port.table.leaves:
                port.write_leaf(selector, value)
            else:
                port.write_members(selector, value)
        else:
            raise GraphError(f"{self._path} has output, input and inputs to be set, not {name!r}", where=user_line())

    def _refuse_as_value(self) -> NoReturn:
        raise GraphError(
            f"{self._path} is an operation, not a value: write `.output` behind it for what it returns, "
            "`.inputs` for what it gets",
            where=user_line(),
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NoSuchNameError(
            f"{self._path} is an operation: it has output, input, inputs and source, not {name!r}", where=user_line()
        )

    def __repr__(self) -> str:
        """The lines around the call, with an arrow at it."""
        outer, _, name = self._way.rpartition(f".{WORD}.")
        code = self._model._index.sources.code(self._module, outer)
        assert code is not None, "its name was found there"
        here = dict(code.operations)[name]
        lines = code.text.rstrip().split("\n")
        shown = range(max(0, here - 4), min(len(lines), here + 5))
        return "\n".join(
            [f"{self._path}:", *(f"{'-->' if n == here else '   '} {_number(n):>4} {lines[n]}" for n in shown)]
        )

    @property
    def _path(self) -> str:
        return operation_path(self._module, self._way)

    def _port(self, port: Port) -> OpenPort:
        tracer = self._model._tracer("", self._path, port.value)
        return OpenPort(tracer, self._table(port))

    def _table(self, port: Port) -> PortTable:
        """The site's table; it goes to the model's others, where recording looks for shapes."""
        index, path = self._model._index, self._path
        known = index.ports.get((path, port.value))
        if known is not None:
            return known
        info = index.sources.site(path, port)
        if info is None:
            raise GraphError(f"{path} {index.sources.why_none(path)}", where=user_line())
        leaves = {leaf.selector: (Site(module=path, port=port, selector=leaf.selector), leaf) for leaf in info.leaves}
        index.leaves.update(leaves.values())
        made = index.ports[path, port.value] = PortTable(info=info, is_layer_output=False, leaves=leaves)
        return made

    def _first_argument(self) -> tuple[OpenPort, tuple[int | str, ...]]:
        port = self._port(Port.INPUTS)
        selectors = [selector[:2] for selector in port.table.leaves]
        if (0, 0) in selectors:
            return port, (0, 0)
        if selectors and all(selector[0] == 1 for selector in selectors):
            return port, selectors[0]
        known = ", ".join(str(site) for site, _ in port.table.leaves.values())
        raise GraphError(
            f"the first argument of {self._path} holds no tensor; those that do are {known}", where=user_line()
        )


def draw_code(code: SourceCode) -> str:
    """A function's lines, numbered, with the operations' names beside them."""
    width = max((len(name) for name, _ in code.operations), default=0)
    names: dict[int, list[str]] = {}
    for name, line in code.operations:
        names.setdefault(line, []).append(name)
    drawn = []
    for number, text in enumerate(code.text.rstrip().split("\n")):
        first, *more = names.get(number, [""])
        drawn.append(f" {first:{width}} {'->' if first else '  '}{_number(number):>4} {text}")
        indent = " " * (len(text) - len(text.lstrip()))
        drawn += [f" {name:{width}} ->   + {indent}..." for name in more]
    return "\n".join(line.rstrip() for line in drawn)


def _number(line: int) -> str:
    """A line's number as nnsight counts: from 0 behind the first, which has a star."""
    return str(line - 1) if line else "*"
