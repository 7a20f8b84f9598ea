"""Nodes as JSON: each form of node once, with columns of what differs between the nodes of that form.

A template is a node with holes, one of
    ["op", line, name, [operand, ...], {key: operand, ...}]     ["call", line, path, [operand, ...]]
    ["read", line, site]    ["write", line, site, in place]     ["parameter", line, path]    ["constant", line, name]
    ["save", line, name]    ["mask", line]    ["stop", line]    ["last", line, count]
    ["backward", line, has a gradient]    ["grad", line]    ["grad write", line]
and of a generation ["read", line, site, "at"], ["write", line, site, in place, "at"], ["save", line, name, "at"],
with a site as [path, port, selector, visit]. In an operand every integer is a hole (written 0), every float (0.0) and
every reference ({"ref": 0}). A path or name is a list of texts with a number between each two, and these numbers are
holes. Holes that are not written: the invoke of a read, write or mask; then the value of a write or save; then, where
it says "at", the step and the number of steps. A stop has its value, invoke, step and number of steps, a last `count`
values in one column, a backward its loss and gradient, a grad its value and backward, a grad write the new value too.
All else, booleans and strings among it, belongs to the form. A template's columns
(`polytrace.folding`) fill its holes from left to right: floats are texts, and a reference counts nodes from the first
one or, as {"back": column}, back from the node itself. `order` says, folded, the template of each node.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any, NoReturn

from polytrace.codec import brief
from polytrace.errors import WireError
from polytrace.folding import fold, fold_column, size_of, unfold, unfold_column, weight_of
from polytrace.graph import (
    Backward,
    Call,
    Carried,
    Constant,
    DType,
    Grad,
    GradWrite,
    Last,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    OpGrad,
    Parameter,
    Port,
    Read,
    Ref,
    Save,
    SeedGrad,
    Site,
    SiteGrad,
    Stop,
    Write,
)

MAX_DEPTH = 12  # of nested operands; the deepest that a client records is a slice in an index in a view step
MAX_TEXT = 4096  # characters of a path, a name or a line
MAX_CELLS = 8  # operands and parts of operands that differ between nodes of one form, for each node that is allowed
_MAX_INT = 1 << 63
_MAX_COUNT = 1 << 31
_MAX_DIGITS = 9  # of a number in a path or name
_PORTS = {port.value: port for port in Port}
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")

Form = tuple[Hashable, ...]


# --- writing


class _Hole:
    """The place of a value that differs between nodes of one form."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain  # how a template spells it


_INT, _FLOAT, _REF = _Hole(0), _Hole(0.0), _Hole({"ref": 0})
_REFS = _Hole(None)  # several nodes
_AT = "at"  # in the form of a node that says its steps


def encode_nodes(nodes: Sequence[Node]) -> tuple[list[Any], list[Any], list[str]]:
    """The templates with their columns, the order, and the lines that templates name by index."""
    forms: dict[Form, int] = {}
    rows: list[list[list[Any]]] = []  # per form and node of that form: what stands in the holes
    places: list[list[int]] = []  # per form: its nodes
    order: list[int] = []
    names = _Names()
    for position, node in enumerate(nodes):
        holes: list[Any] = []
        form = _form(node, holes, names)
        number = forms.setdefault(form, len(rows))
        if number == len(rows):
            rows.append([])
            places.append([])
        rows[number].append(holes)
        places[number].append(position)
        order.append(number)
    wheres: dict[str, int] = {}
    templates = []
    for form, number in forms.items():
        kind, where, *rest = form
        assert isinstance(where, str)
        written = [_plain(part) for part in rest if not isinstance(part, _Hole)]
        template = [kind, wheres.setdefault(where, len(wheres)), *written]
        columns = zip(*rows[number], strict=True)
        kinds = _holes_of(form)
        templates.append([template, [_column(*pair, places[number]) for pair in zip(kinds, columns, strict=False)]])
    return templates, fold(order), list(wheres)


class _Names:
    """Texts and sites of one graph, taken apart once each."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[Form, tuple[int, ...]]] = {}
        self._sites: dict[int, tuple[Form, tuple[int, ...]]] = {}  # by the object's id: the graph keeps it

    def text(self, text: str, holes: list[Any]) -> Form:
        found = self._texts.get(text)
        if found is None:
            parts = _NUMBER.split(text)
            form: list[Hashable] = ["text", parts[0]]
            for part in parts[2::2]:
                form += (_INT, part)
            found = self._texts[text] = (tuple(form), tuple([int(part) for part in parts[1::2]]))
        holes += found[1]
        return found[0]

    def site(self, site: Site, holes: list[Any]) -> Form:
        found = self._sites.get(id(site))
        if found is None:
            numbers: list[Any] = []
            path = self.text(site.module, numbers)
            form = ("site", path, site.port.value, ("keys", *site.selector), ("keys", site.visit))
            found = self._sites[id(site)] = (form, tuple(numbers))
        holes += found[1]
        return found[0]


def _form(node: Node, holes: list[Any], names: _Names) -> Form:
    """What nodes of one form have in common; what is left goes into `holes`."""
    if isinstance(node, Op):
        args = ("list", *_forms(node.args, holes))
        kwargs = ("dict", *node.kwargs, *_forms(node.kwargs.values(), holes)) if node.kwargs else ("dict",)
        return ("op", node.where, node.name, args, kwargs)
    if isinstance(node, Read):
        site = names.site(node.site, holes)
        holes.append(node.invoke)
        return ("read", node.where, site, _INT, *_when(node, holes))
    if isinstance(node, Write):
        site = names.site(node.site, holes)
        holes += (node.invoke, node.value.node)
        return ("write", node.where, site, node.in_place, _INT, _REF, *_when(node, holes))
    if isinstance(node, Save):
        name = names.text(node.name, holes)
        holes.append(node.value.node)
        return ("save", node.where, name, _REF, *_when(node, holes))
    if isinstance(node, Last):
        holes.append(tuple([value.node for value in node.values]))
        return ("last", node.where, len(node.values), _REFS)
    if isinstance(node, Stop):
        holes += (node.value.node, node.invoke, node.step, node.num_steps)
        return ("stop", node.where, _REF, _INT, _INT, _INT)
    if isinstance(node, (Backward, Grad, GradWrite)):
        return _gradient_form(node, holes)
    if isinstance(node, (Carried, SiteGrad, OpGrad, SeedGrad)):
        raise TypeError(f"a {type(node).__name__} is never sent")
    if isinstance(node, Call):
        module = names.text(node.module, holes)
        return ("call", node.where, module, ("list", *_forms(node.args, holes)))
    if isinstance(node, Mask):
        holes.append(node.invoke)
        return ("mask", node.where, _INT)
    if isinstance(node, Constant):
        return ("constant", node.where, names.text(node.name, holes))
    return ("parameter", node.where, names.text(node.path, holes))


def _gradient_form(node: Backward | Grad | GradWrite, holes: list[Any]) -> Form:
    """The form of a node of gradients: all that differs are nodes."""
    if isinstance(node, Backward):
        holes += [node.loss.node] if node.gradient is None else [node.loss.node, node.gradient.node]
        has_gradient = node.gradient is not None
        return ("backward", node.where, has_gradient, *([_REF, _REF] if has_gradient else [_REF]))
    holes += (node.of.node, node.backward.node)
    if isinstance(node, Grad):
        return ("grad", node.where, _REF, _REF)
    holes.append(node.value.node)
    return ("grad write", node.where, _REF, _REF, _REF)


def _when(node: Read | Write | Save, holes: list[Any]) -> Form:
    """The steps of a node that has any but the first alone."""
    if (node.step, node.num_steps) == (None if isinstance(node, Save) else 0, 1):
        return ()
    holes += (node.step, node.num_steps)
    return (_AT, _INT, _INT)


def _forms(parts: Iterable[Operand], holes: list[Any]) -> list[Hashable]:
    found: list[Hashable] = []
    for part in parts:
        if isinstance(part, Ref):
            holes.append(part.node)
            found.append(_REF)
        elif isinstance(part, int) and not isinstance(part, bool):
            holes.append(part)
            found.append(_INT)
        elif part is None or isinstance(part, (bool, str)) or part is Ellipsis:
            found.append(part)
        elif isinstance(part, float):
            holes.append(repr(part))
            found.append(_FLOAT)
        elif isinstance(part, slice):
            found.append(("slice", *_forms((part.start, part.stop, part.step), holes)))
        elif isinstance(part, DType):
            found.append(("dtype", part.name))
        elif isinstance(part, tuple):
            found.append(("tuple", *_forms(part, holes)))
        else:
            found.append(("list", *_forms(part, holes)))
    return found


def _plain(form: Any) -> Any:
    """A part of a form as a template spells it."""
    if isinstance(form, _Hole):
        return form.plain
    if form is Ellipsis:
        return {"ellipsis": True}
    if not isinstance(form, tuple):
        return form
    kind, *parts = form
    match kind:
        case "text":
            return [part for part in parts if isinstance(part, str)]
        case "site":
            path, port, selector, visit = parts
            return [_plain(path), port, list(selector[1:]), visit[1]]
        case "dict":
            names = parts[: len(parts) // 2]
            return dict(zip(names, map(_plain, parts[len(names) :]), strict=True))
        case "list":
            return [_plain(part) for part in parts]
        case "dtype":
            return {"dtype": parts[0]}
    return {kind: [_plain(part) for part in parts]}


def _holes_of(form: Form) -> Iterator[_Hole]:
    for part in form:
        if isinstance(part, _Hole):
            yield part
        elif isinstance(part, tuple):
            yield from _holes_of(part)


def _column(kind: _Hole, values: Sequence[Any], places: Sequence[int]) -> Any:
    if kind is _FLOAT:
        return fold(values)
    if kind is _INT:
        return fold_column(values)
    if kind is _REFS:
        places = [place for place, own in zip(places, values, strict=True) for _ in own]
        values = [node for own in values for node in own]
    back = fold_column([place - value for place, value in zip(places, values, strict=True)])
    if isinstance(back, int):
        return {"back": back}
    column = fold_column(values)
    return column if weight_of(column) <= weight_of(back) else {"back": back}


# --- reading


def decode_nodes(templates: Any, order: Any, wheres: Any, *, max_nodes: int) -> tuple[Node, ...]:
    """The nodes, with every size, index, type and length checked before memory is taken. Raises WireError."""
    if not isinstance(templates, list) or not isinstance(wheres, list):
        raise WireError("templates and wheres are lists")
    lines = [_text(where) for where in wheres]
    numbers = _order(order, len(templates), max_nodes)
    places: list[list[int]] = [[] for _ in templates]
    for position, number in enumerate(numbers):
        places[number].append(position)
    budget = _Budget(MAX_CELLS * max_nodes)
    nodes: list[Any] = [None] * len(numbers)
    for number, (entry, own) in enumerate(zip(templates, places, strict=True)):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            raise WireError(f"template {number} is not a node with holes and its columns")
        if not own:
            raise WireError(f"template {number} has no node")
        reader = _Reader(entry[1], own, budget)
        for place, node in zip(own, _nodes(entry[0], reader, lines), strict=True):
            nodes[place] = node
        reader.close()
    return tuple(nodes)


def _order(plain: Any, num_templates: int, max_nodes: int) -> list[int]:
    def is_template(value: Any) -> bool:
        return type(value) is int and 0 <= value < num_templates

    size = size_of(plain, is_template, 1 << 62)
    if size > max_nodes:
        raise WireError(f"the request has {size} nodes; at most {max_nodes} are taken")
    return unfold(plain, size, is_template)


@dataclass(frozen=True, slots=True)
class _Same:
    """A value that all nodes of a template have."""

    value: Any


_Values = _Same | list[Any]  # of all nodes of a template, in order


class _Budget:
    """How many values that differ may still be made."""

    def __init__(self, cells: int) -> None:
        self._cells = self._left = cells

    def take(self, cells: int) -> None:
        self._left -= cells
        if self._left < 0:
            raise WireError(f"the nodes have more than {self._cells} operands that differ")


class _Reader:
    """The columns of one template, taken from left to right."""

    def __init__(self, columns: list[Any], places: list[int], budget: _Budget) -> None:
        self.places = places
        self._columns = iter(columns)
        self._budget = budget

    def integers(self, low: int = 0, high: int = _MAX_COUNT) -> _Values:
        """The next column, of integers from `low` to below `high`."""
        return self._integers(self._next(), low, high)

    def floats(self) -> _Values:
        """The next column, of floats."""
        self._budget.take(len(self.places))
        return [float(text) for text in unfold(self._next(), len(self.places), _is_float)]

    def refs(self) -> _Values:
        """The next column, of nodes."""
        plain = self._next()
        if not (isinstance(plain, dict) and plain.keys() == {"back"}):
            return self.each(lambda target: Ref(NodeId(target)), self._integers(plain, 0, _MAX_COUNT))
        back = self._integers(plain["back"], -_MAX_COUNT, _MAX_COUNT)
        steps: Iterable[int] = repeat(back.value) if isinstance(back, _Same) else back
        self._budget.take(len(self.places))
        return [Ref(NodeId(place - step)) for place, step in zip(self.places, steps)]  # noqa: B905  repeat has no end

    def ref_lists(self, count: int) -> list[tuple[Ref, ...]]:
        """The next column, of so many nodes for each node."""
        if isinstance(count, bool) or count < 1:
            raise WireError(f"{brief(count)} is no number of nodes")
        self._budget.take(len(self.places) * count)
        places = [place for place in self.places for _ in range(count)]
        refs = _Reader([self._next()], places, self._budget).refs()
        every = refs if isinstance(refs, list) else [refs.value] * len(places)
        return [tuple(every[first : first + count]) for first in range(0, len(every), count)]

    def each(self, make: Callable[[Any], Any], values: _Values) -> _Values:
        """`make` of each value."""
        if isinstance(values, _Same):
            return _Same(make(values.value))
        self._budget.take(len(values))
        return list(map(make, values))

    def joined(self, make: Callable[[tuple[Any, ...]], Any], members: Sequence[_Values]) -> _Values:
        """`make` of each node's members."""
        if all(isinstance(member, _Same) for member in members):
            return _Same(make(tuple([member.value for member in members if isinstance(member, _Same)])))
        self._budget.take(len(self.places) * (1 + len(members)))
        return list(map(make, self.rows(*members)))

    def rows(self, *members: _Values) -> Iterable[tuple[Any, ...]]:
        """Each node's members."""
        count = len(self.places)
        return zip(*[repeat(part.value, count) if isinstance(part, _Same) else part for part in members], strict=True)

    def close(self) -> None:
        """Raises WireError when there are more columns than holes."""
        if next(self._columns, None) is not None:
            raise WireError("a template has more columns than holes")

    def _next(self) -> Any:
        column = next(self._columns, None)
        if column is None:
            raise WireError("a template has more holes than columns")
        return column

    def _integers(self, plain: Any, low: int, high: int) -> _Values:
        if type(plain) is not int:
            self._budget.take(len(self.places))
        values = unfold_column(plain, len(self.places), low, high)
        return values if isinstance(values, list) else _Same(values)


def _nodes(plain: Any, reader: _Reader, wheres: list[str]) -> list[Node]:
    """The nodes of one template."""
    if not isinstance(plain, list) or len(plain) < 2 or not isinstance(plain[0], str):
        raise WireError("a node is a list of a kind, a line and more")
    kind, index, *rest = plain
    where = wheres[_index(index, len(wheres))]
    match kind, rest:
        case "op", [name, list(args), dict(kwargs)]:
            op, keys = _text(name), [_text(key) for key in kwargs]
            arguments = reader.joined(tuple, _operands(args, reader))
            named = reader.joined(lambda own: dict(zip(keys, own, strict=True)), _operands(kwargs.values(), reader))
            return [Op(name=op, args=own, kwargs=more, where=where) for own, more in reader.rows(arguments, named)]
        case "read", [site, *at] if at in _STEPS:
            rows = reader.rows(_sites(site, reader), reader.integers(), *_steps(at, reader, 0))
            return [
                Read(site=place, invoke=invoke, where=where, step=step, num_steps=count)
                for place, invoke, step, count in rows
            ]
        case "write", [site, bool(in_place), *at] if at in _STEPS:
            rows = reader.rows(_sites(site, reader), reader.integers(), reader.refs(), *_steps(at, reader, 0))
            return [
                Write(
                    site=place, invoke=invoke, value=value, in_place=in_place, where=where, step=step, num_steps=count
                )
                for place, invoke, value, step, count in rows
            ]
        case "save", [name, *at] if at in _STEPS:
            rows = reader.rows(_names(name, reader), reader.refs(), *_steps(at, reader, None))
            return [
                Save(name=text, value=value, where=where, step=step, num_steps=count)
                for text, value, step, count in rows
            ]
        case "stop", []:
            rows = reader.rows(reader.refs(), reader.integers(), *_steps([_AT], reader, 0))
            return [
                Stop(value=value, invoke=invoke, where=where, step=step, num_steps=count)
                for value, invoke, step, count in rows
            ]
        case "last", [int(count)]:
            return [Last(values=values, where=where) for values in reader.ref_lists(count)]
        case "backward", [bool(has_gradient)]:
            rows = reader.rows(reader.refs(), reader.refs() if has_gradient else _Same(None))
            return [Backward(loss=loss, gradient=gradient, where=where) for loss, gradient in rows]
        case "grad", []:
            rows = reader.rows(reader.refs(), reader.refs())
            return [Grad(of=of, backward=backward, where=where) for of, backward in rows]
        case "grad write", []:
            rows = reader.rows(reader.refs(), reader.refs(), reader.refs())
            return [GradWrite(of=of, backward=backward, value=value, where=where) for of, backward, value in rows]
        case "call", [module, list(args)]:
            rows = reader.rows(_names(module, reader), reader.joined(tuple, _operands(args, reader)))
            return [Call(module=path, args=own, where=where) for path, own in rows]
        case "mask", []:
            return [Mask(invoke=invoke, where=where) for (invoke,) in reader.rows(reader.integers())]
        case "constant", [name]:
            return [Constant(name=text, where=where) for (text,) in reader.rows(_names(name, reader))]
        case "parameter", [path]:
            return [Parameter(path=text, where=where) for (text,) in reader.rows(_names(path, reader))]
    raise WireError(f"{brief(kind)} with {len(rest)} parts is not a node of any kind")


_STEPS: tuple[list[Any], ...] = ([], [_AT])


def _steps(at: Sequence[Any], reader: _Reader, plain: int | None) -> tuple[_Values, _Values]:
    """The first step and the number of steps of each node; `plain`: the step of nodes that do not say it."""
    return (reader.integers(), reader.integers(1)) if at else (_Same(plain), _Same(1))


def _operands(plain: Iterable[Any], reader: _Reader, depth: int = 0) -> list[_Values]:
    return [_operand(part, reader, depth) for part in plain]


def _operand(plain: Any, reader: _Reader, depth: int) -> _Values:
    """The operand that `plain` spells, for each node."""
    if depth > MAX_DEPTH:
        raise WireError(f"an operand nests deeper than {MAX_DEPTH}")
    if plain is None or isinstance(plain, bool):
        return _Same(plain)
    if isinstance(plain, str):
        return _Same(_text(plain))
    if isinstance(plain, list):
        return reader.joined(list, _operands(plain, reader, depth + 1))
    if type(plain) in (int, float) and plain == 0:
        return reader.floats() if isinstance(plain, float) else reader.integers(-_MAX_INT, _MAX_INT)
    if isinstance(plain, dict) and len(plain) == 1:
        ((key, value),) = plain.items()
        match key, value:
            case "ref", 0:
                return reader.refs()
            case "dtype", str(name):
                return _Same(DType(_text(name)))
            case "ellipsis", True:
                return _Same(Ellipsis)
            case "tuple", list(parts):
                return reader.joined(tuple, _operands(parts, reader, depth + 1))
            case "slice", [_, _, _]:
                return reader.joined(_slice, _operands(value, reader, depth + 1))
    raise WireError(f"{brief(plain)} is not an operand")


def _slice(parts: tuple[Any, ...]) -> slice:
    if not all(part is None or isinstance(part, Ref) or type(part) is int for part in parts):
        raise WireError("a part of a slice is an integer, a node or null")
    return slice(*parts)


def _names(plain: Any, reader: _Reader) -> _Values:
    """A path or name: texts with a number between each two."""
    if not isinstance(plain, list) or not plain or not all(isinstance(part, str) for part in plain):
        raise WireError("a path or name is a list of texts")
    if sum(map(len, plain)) + _MAX_DIGITS * (len(plain) - 1) > MAX_TEXT:
        raise WireError(f"a path or name has more than {MAX_TEXT} characters")
    numbers = [reader.integers(0, 10**_MAX_DIGITS) for _ in plain[1:]]
    pattern = "{}".join(part.replace("{", "{{").replace("}", "}}") for part in plain)
    return reader.joined(lambda own: pattern.format(*own), numbers)


def _sites(plain: Any, reader: _Reader) -> _Values:
    match plain:
        case [path, str(port), list(selector), visit] if port in _PORTS and len(selector) <= 4:
            keys = tuple(_text(key) if isinstance(key, str) else _count(key) for key in selector)
            side, number = _PORTS[port], _count(visit)
            made = cache(lambda module: Site(module=module, port=side, selector=keys, visit=number))
            return reader.each(made, _names(path, reader))
    raise WireError(f"{brief(plain)} is not a site")


def _is_float(text: Any) -> bool:
    """Whether a text is a float as Python writes it."""
    try:
        return isinstance(text, str) and repr(float(text)) == text
    except ValueError:
        return False


def _index(plain: Any, length: int) -> int:
    if _count(plain) >= length:
        raise WireError(f"index {plain} is beyond a table of {length}")
    return int(plain)


def _count(plain: Any) -> int:
    if type(plain) is not int or not 0 <= plain < _MAX_COUNT:
        _refuse(plain, "an integer from 0 to 2**31 - 1")
    return plain


def _text(plain: Any) -> str:
    if not isinstance(plain, str) or len(plain) > MAX_TEXT:
        _refuse(plain, f"a string of at most {MAX_TEXT} characters")
    return plain


def _refuse(plain: Any, expected: str) -> NoReturn:
    raise WireError(f"{brief(plain)} stands where {expected} belongs")
