"""The model's module tree as researchers know it: attributes, lists, `.output`, `.input`, parameters, calls.

A `Module` is a path; it holds no weights. What it reads and writes goes to the trace that is open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NoReturn

from polytrace import hints
from polytrace.description import ModuleInfo
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Port
from polytrace.image_checks import hint_at_images
from polytrace.inputs import inputs_table
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.module_dicts import DICT_METHODS, member_of, names_of
from polytrace.no_tensors import NONE, a_class
from polytrace.not_values import NotAValue
from polytrace.points import DIMS, Points, owners, point_table
from polytrace.ports import OpenPort
from polytrace.skipping import skip_module
from polytrace.tree import NoSuchLayerError, NoSuchNameError, PortTable, Table, draw, join
from polytrace.visits import Visits

if TYPE_CHECKING:
    from polytrace.model import Model
    from polytrace.source_views import Source


class Module(NotAValue):
    """One module of the model. Its children are made when they are first asked for, and kept."""

    _model: Model
    _path: str
    _visit: int = 0

    def __init__(self, model: Model, path: str) -> None:
        self.__dict__.update(_model=model, _path=path)

    @property
    def output(self) -> Any:
        """What the module returned: a recorded value, or its members for tuples, dicts and ModelOutputs."""
        return self._port("output").read()

    @property
    def input(self) -> Any:
        """The first argument that the module was called with."""
        return self._port("input").read()

    @property
    def inputs(self) -> Any:
        """All that the module was called with, `(args, kwargs)`: `inputs[0][0]`, `inputs[1]["position_ids"]`."""
        return self._port("inputs").read()

    @property
    def source(self) -> Source:
        """The text of its forward, and every call in it: print it to see their names."""
        return self._model.source_of(self._path)

    def skip(self, value: Any) -> None:
        """The module is not run for this invoke's prompts: `value` is its output, in the module's own structure.

        A tensor for a module that returns one, or a tuple with one that traces can read or write; else a tuple or
        dict with all of them. What lies inside of the module cannot be read or written then. See `polytrace.skipping`.
        """
        skip_module(self._port("output"), value)

    def next(self, step: int = 1) -> Module:
        """In a generation: behind this, the module and what is inside of it are read and written a step later."""
        self._model._tracer("", self._path, "next").move_on(self._path, step)
        return self

    @property
    def visits(self) -> Visits:
        """Its calls within one forward, of a model that is called as it is: `module.visits[2].output`."""
        return Visits(self)

    @property
    def points(self) -> Points:
        """The named points of this module, of a decoder layer those inside it too, with their dimensions' names."""
        return Points(self._table, self._path)

    def get_submodule(self, path: str) -> Module:
        """A module by its dotted path from here, also where its name is one of ours (`output`)."""
        full = self._table.native(path, self._path)
        self._table.module(full)
        return Module(self._model, full)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        table, path = self._table, self._path
        if name in table.children.get(path, ()):
            child = self.__dict__[name] = Module(self._model, join(path, name))
            return child
        if name in table.aliases.get(path, ()):
            child = self.__dict__[name] = Module(self._model, table.aliases[path][name])
            return child
        if name in table.own_parameters.get(path, ()):
            tracer = self._model._tracer("the parameter ", path, name)
            return tracer.wrap(tracer.recording.parameter(join(path, name)))
        if name in table.layer_weights.get(path, ()):
            tracer = self._model._tracer("the weight ", path, name)
            return tracer.wrap(tracer.recording.parameter(table.layer_weights[path][name]))
        if self._info.is_dict and name in DICT_METHODS:
            return partial(DICT_METHODS[name], self)
        if name in self._ports or name in self._points:
            return self._port(name).read()
        if (why := table.why_not(path, name) or table.why_no_own_path(join(path, name))) is not None:
            raise NoSuchNameError(f"{path or 'the model'} has no {name}: {why}", where=user_line())
        known = [*table.children.get(path, ()), *table.aliases.get(path, ()), *table.own_parameters.get(path, ())]
        known += [*self._points, "output", "input"]
        close = (
            f": {told}"
            if (told := hints.of_module(name))
            else nearest(name, sorted({*known, *dir(self)})) or f"; it has {', '.join(known)}"
        )
        raise NoSuchNameError(
            f"{path or 'the model'} ({self._info.class_name}) has no {name!r}{close}", where=user_line()
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("output", "input", "inputs") or name in self._ports or name in self._points:
            self._port(name).write(value)
            return
        raise GraphError(
            f"{join(self._path, name)} cannot be set: a trace changes what modules receive and return "
            "(`.input`, `.output`), never the model itself",
            where=user_line(),
        )

    def __getitem__(self, index: Any) -> Any:
        members = self._members
        if self._info.is_dict:
            return member_of(self, index)
        if isinstance(index, slice):
            return list(members[index])
        number = scalar(index)
        if not self._is_indexed and (isinstance(index, tuple) or index is Ellipsis or number is not None):
            self._refuse_as_value()
        if isinstance(index, str) or not isinstance(number, int) or not self._is_indexed:
            numbers = f"; it is indexed by the numbers 0-{len(members) - 1}" if self._is_indexed and members else ""
            raise GraphError(
                f"{self._path or 'the model'} ({self._info.class_name}) has no [{index!r}]{numbers}", where=user_line()
            )
        if not -len(members) <= number < len(members):
            noun = "layers" if self._path == self._table.description.layers else f"{self._path}"
            span = f"has {noun} 0-{len(members) - 1}" if members else f"has no {noun}"
            raise NoSuchLayerError(f"there is no {self._path}[{number}]; this model {span}", where=user_line())
        return members[number]

    def __iter__(self) -> Iterator[Any]:
        if self._info.is_dict:
            return iter(names_of(self))
        if not self._is_indexed:
            raise GraphError(
                f"{self._path or 'the model'} is not a list of modules; it has "
                f"{', '.join(self._table.children.get(self._path, ())) or 'no modules of its own'}",
                where=user_line(),
            )
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __bool__(self) -> bool:
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module applied to values of the trace, with the weights that are served."""
        path = self._path or "the model"
        refusal = self._info.call_refusal or ("it is a list of modules: index it" if self._info.is_list else None)
        if refusal is not None:
            raise GraphError(f"{path} cannot be called on a value: {refusal}", where=user_line())
        if kwargs or not args:
            raise GraphError(f"{path} is called with values alone, without keywords: {path}(value)", where=user_line())
        tracer = self._model._tracer("", path)
        tracer.check_call(self._path, user_line())
        return tracer.wrap(tracer.recording.call(self._path, args))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Module) and (other._model, other._path) == (self._model, self._path)

    def __hash__(self) -> int:
        return hash((id(self._model), self._path))

    def __dir__(self) -> list[str]:
        table = self._table
        own = [*table.children.get(self._path, ()), *table.own_parameters.get(self._path, ()), *self._points]
        own += [*table.aliases.get(self._path, ()), *table.layer_weights.get(self._path, ())]
        own += DICT_METHODS if self._info.is_dict else ()
        return sorted({*own, *(name for name in dir(type(self)) if not name.startswith("_"))})

    def __repr__(self) -> str:
        points = repr(self.points).replace("\n", "\n  ")
        return draw(self._table, self._path) + (f"\npoints:\n  {points}" if points else "")

    @property
    def _table(self) -> Table:
        return self._model._index

    @property
    def _info(self) -> ModuleInfo:
        return self._table.modules[self._path]

    @cached_property
    def _members(self) -> tuple[Module, ...]:
        """Its children, in the model's order."""
        names = self._table.children.get(self._path, ())
        return tuple(Module(self._model, join(self._path, name)) for name in names)

    @property
    def _ports(self) -> dict[str, PortTable]:
        """Its sides that the model's forward visits, and the points inside of an attention module."""
        table = self._table
        known: tuple[Table, dict[str, PortTable]] | None = self.__dict__.get("_known_ports")
        if known is None or known[0] is not table:
            known = self.__dict__["_known_ports"] = (table, self._find_ports(table))
        return known[1]

    def at_visit(self, number: int) -> Module:
        """The module at one of its calls within a forward: `visits[number]`."""
        return VisitedModule(self._model, self._path, number) if number else self

    def _find_ports(self, table: Table) -> dict[str, PortTable]:
        known = table.ports
        found = {port.value: known[self._path, port.value] for port in Port if (self._path, port.value) in known}
        arguments = inputs_table(table, self._path)
        return found if arguments is None else found | {Port.INPUTS.value: arguments}

    @cached_property
    def _points(self) -> dict[str, str]:
        """Names of points, and the modules that have them."""
        return owners(self._table, self._path)

    @cached_property
    def _is_indexed(self) -> bool:
        """A ModuleList, or another module whose children are numbers (Sequential)."""
        names = self._table.children.get(self._path, ())
        return self._info.is_list or (bool(names) and not self._info.is_dict and all(map(str.isdigit, names)))

    def _port(self, port: str) -> OpenPort:
        owner = self._points.get(port, self._path)
        table = point_table(self._table, owner, port) or self._ports.get(port) or self._refuse_port(port)
        return OpenPort(self._model._tracer("", self._path, port), table)

    def _refuse_as_value(self) -> NoReturn:
        path = self._path or "the model"
        if self._info.is_list:
            raise GraphError(
                f"{path} is a list of modules, not a value: index it, as in {path}[0].output", where=user_line()
            )
        raise GraphError(
            f"{path} ({self._info.class_name}) is a module, not a value: write `.output` behind it for what it "
            "returns, `.input` for what it gets",
            where=user_line(),
        )

    def _refuse_port(self, port: str) -> NoReturn:
        path = self._path or "the model"
        self._model._check_called(join(self._path, port))
        if self._info.is_list:
            raise GraphError(f"{path} is a list of modules: index it, as in {path}[0].{port}", where=user_line())
        told = f"nothing in it gives a {port}" if port in DIMS else self._why_no_tensors(port)
        told += hint_at_images(self._path, self._model.description)
        raise GraphError(f"{path} has no {port}: in this model's forward {told}", where=user_line())

    def _why_no_tensors(self, port: str) -> str:
        """What is known of a side without tensors."""
        side = Port.OUTPUT.value if port == Port.OUTPUT.value else Port.INPUT.value
        fired = self._table.visits.get((self._path, side), {}).get(self._visit)
        whole = None if fired is None else next((one for one in fired.info.members if not one.selector), None)
        if fired is None:
            return "it is not called, or handed no tensors"
        verb = "it gives" if side == Port.OUTPUT.value else "its first argument is"
        if whole is None or whole.why_not is None:
            is_none = whole is not None and whole.class_name == NONE
            return f"{verb} {'None' if is_none else f'a {fired.info.structure} without tensors'}"
        return f"{verb} {a_class(whole.class_name)}, which {whole.why_not}"


class VisitedModule(Module):
    """A module at one of its later calls within a forward. Its children are those that it has at their first."""

    def __init__(self, model: Model, path: str, visit: int) -> None:
        super().__init__(model, path)
        self.__dict__.update(_visit=visit)

    def _find_ports(self, table: Table) -> dict[str, PortTable]:
        later = {
            key: visits[self._visit]
            for key, visits in table.visits.items()
            if key[0] == self._path and self._visit in visits and visits[self._visit].leaves
        }
        return super()._find_ports(replace(table, ports=later))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisitedModule) and super().__eq__(other) and other._visit == self._visit

    __hash__ = Module.__hash__

    def __repr__(self) -> str:
        return f"call {self._visit} of {super().__repr__()}"
