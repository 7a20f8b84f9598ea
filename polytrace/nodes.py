"""Nodes and operands as JSON, by two explicit tables.

A node is `[kind, where, ...]` with its line and its site as indices into tables. An operand that JSON spells alike
stands as it is (null, booleans, integers, finite floats, strings, lists); everything else is an object with one key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from polytrace.codec import NON_FINITE, brief, name_of_float
from polytrace.errors import WireError
from polytrace.graph import (
    Call,
    Constant,
    DType,
    Mask,
    Node,
    NodeId,
    Op,
    Operand,
    Parameter,
    Port,
    Read,
    Ref,
    Save,
    Site,
    Write,
)

MAX_DEPTH = 12  # of nested operands; the deepest that a client records is a slice in an index in a view step
MAX_TEXT = 4096  # characters of a path, a name or a line
_MAX_INT = 1 << 63
_PORTS = {port.value: port for port in Port}


def encode_nodes(nodes: Sequence[Node]) -> tuple[list[Any], list[Any], list[str]]:
    """The nodes, the sites and the lines that they name by index."""
    sites: dict[Site, int] = {}
    wheres: dict[str, int] = {}
    encoded: list[Any] = []
    for node in nodes:
        where = wheres.setdefault(node.where, len(wheres))
        if isinstance(node, Read):
            encoded.append(["read", where, sites.setdefault(node.site, len(sites)), node.invoke])
        elif isinstance(node, Write):
            site = sites.setdefault(node.site, len(sites))
            encoded.append(["write", where, site, node.invoke, node.value.node, node.in_place])
        elif isinstance(node, Op):
            kwargs = {key: encode_operand(value) for key, value in node.kwargs.items()}
            encoded.append(["op", where, node.name, [encode_operand(arg) for arg in node.args], kwargs])
        elif isinstance(node, Call):
            encoded.append(["call", where, node.module, [encode_operand(arg) for arg in node.args]])
        elif isinstance(node, Parameter):
            encoded.append(["parameter", where, node.path])
        elif isinstance(node, Constant):
            encoded.append(["constant", where, node.name])
        elif isinstance(node, Mask):
            encoded.append(["mask", where, node.invoke])
        else:
            encoded.append(["save", where, node.name, node.value.node])
    tables = [[site.module, site.port.value, list(site.selector), site.visit] for site in sites]
    return encoded, tables, list(wheres)


def encode_operand(operand: Operand) -> Any:
    """The operand as strict JSON."""
    if operand is None or isinstance(operand, (bool, int, str)):
        return operand
    if isinstance(operand, float):
        return operand if math.isfinite(operand) else {"float": name_of_float(operand)}
    if isinstance(operand, Ref):
        return {"ref": operand.node}
    if isinstance(operand, DType):
        return {"dtype": operand.name}
    if isinstance(operand, slice):
        return {"slice": [encode_operand(part) for part in (operand.start, operand.stop, operand.step)]}
    if operand is Ellipsis:
        return {"ellipsis": True}
    if isinstance(operand, tuple):
        return {"tuple": [encode_operand(part) for part in operand]}
    return [encode_operand(part) for part in operand]


def decode_nodes(nodes: Any, sites: Any, wheres: Any, *, max_nodes: int) -> tuple[Node, ...]:
    """The nodes, with every index, type and length checked. Raises WireError."""
    for name, table in (("nodes", nodes), ("sites", sites), ("wheres", wheres)):
        if not isinstance(table, list):
            raise WireError(f"{name} is not a list")
        if len(table) > max_nodes:
            raise WireError(f"the request has {len(table)} {name}; at most {max_nodes} are taken")
    lines = [_text(where) for where in wheres]
    places = [_site(plain) for plain in sites]
    return tuple(_node(plain, places, lines, position) for position, plain in enumerate(nodes))


def decode_operand(plain: Any, depth: int = 0) -> Operand:
    """The operand that `plain` spells. Raises WireError."""
    if depth > MAX_DEPTH:
        raise WireError(f"an operand nests deeper than {MAX_DEPTH}")
    if plain is None or isinstance(plain, bool):
        return plain
    if isinstance(plain, int):
        if not -_MAX_INT <= plain < _MAX_INT:
            raise WireError("an integer does not fit into 64 bits")
        return plain
    if isinstance(plain, float):
        if not math.isfinite(plain):
            raise WireError("a float is beyond what 64 bits hold")
        return plain
    if isinstance(plain, str):
        return _text(plain)
    if isinstance(plain, list):
        return [decode_operand(part, depth + 1) for part in plain]
    if isinstance(plain, dict) and len(plain) == 1:
        ((key, value),) = plain.items()
        if key in _OPERANDS:
            return _OPERANDS[key](value, depth)
    raise WireError(f"{brief(plain)} is not an operand")


def _slice(plain: Any, depth: int) -> slice:
    if not isinstance(plain, list) or len(plain) != 3:
        raise WireError("a slice has three parts")
    parts = [decode_operand(part, depth + 1) for part in plain]
    if not all(part is None or isinstance(part, Ref) or type(part) is int for part in parts):
        raise WireError("a part of a slice is an integer, a node or null")
    return slice(*parts)


def _tuple(plain: Any, depth: int) -> tuple[Operand, ...]:
    if not isinstance(plain, list):
        raise WireError("a tuple is not a list of operands")
    return tuple(decode_operand(part, depth + 1) for part in plain)


def _float(plain: Any, depth: int) -> float:
    if not isinstance(plain, str) or plain not in NON_FINITE:
        raise WireError("a float that JSON lacks is nan, inf or -inf")
    return NON_FINITE[plain]


def _ellipsis(plain: Any, depth: int) -> Any:
    if plain is not True:
        raise WireError("an ellipsis is {ellipsis: true}")
    return Ellipsis


_OPERANDS: dict[str, Callable[[Any, int], Operand]] = {
    "ref": lambda plain, depth: _ref(plain),
    "dtype": lambda plain, depth: DType(_text(plain)),
    "float": _float,
    "slice": _slice,
    "ellipsis": _ellipsis,
    "tuple": _tuple,
}


def _node(plain: Any, sites: list[Site], wheres: list[str], position: int) -> Node:
    if not isinstance(plain, list) or len(plain) < 2 or not isinstance(plain[0], str):
        raise WireError(f"node {position} is not a list of a kind, a line and more")
    kind, where_index, *rest = plain
    where = wheres[_index(where_index, len(wheres))]
    match kind, rest:
        case "read", [site, invoke]:
            return Read(site=sites[_index(site, len(sites))], invoke=_count(invoke), where=where)
        case "write", [site, invoke, value, in_place]:
            place = sites[_index(site, len(sites))]
            return Write(site=place, invoke=_count(invoke), value=_ref(value), in_place=_boolean(in_place), where=where)
        case "op", [name, list(args), dict(kwargs)]:
            return Op(
                name=_text(name),
                args=tuple(decode_operand(arg) for arg in args),
                kwargs={_text(key): decode_operand(value) for key, value in kwargs.items()},
                where=where,
            )
        case "call", [module, list(args)]:
            return Call(module=_text(module), args=tuple(decode_operand(arg) for arg in args), where=where)
        case "parameter", [path]:
            return Parameter(path=_text(path), where=where)
        case "constant", [name]:
            return Constant(name=_text(name), where=where)
        case "mask", [invoke]:
            return Mask(invoke=_count(invoke), where=where)
        case "save", [name, value]:
            return Save(name=_text(name), value=_ref(value), where=where)
    raise WireError(f"node {position} is not a node of any kind: {brief(kind)}")


def _site(plain: Any) -> Site:
    match plain:
        case [str(module), str(port), list(selector), int(visit)] if port in _PORTS and len(selector) <= 4:
            keys = tuple(_text(key) if isinstance(key, str) else _count(key) for key in selector)
            return Site(module=_text(module), port=_PORTS[port], selector=keys, visit=_count(visit))
    raise WireError(f"{brief(plain)} is not a site")


def _ref(plain: Any) -> Ref:
    return Ref(NodeId(_count(plain)))


def _index(plain: Any, length: int) -> int:
    if _count(plain) >= length:
        raise WireError(f"index {plain} is beyond a table of {length}")
    return int(plain)


def _count(plain: Any) -> int:
    if type(plain) is not int or not 0 <= plain < 1 << 31:
        _refuse(plain, "an integer from 0 to 2**31 - 1")
    return plain


def _boolean(plain: Any) -> bool:
    if not isinstance(plain, bool):
        _refuse(plain, "true or false")
    return plain


def _text(plain: Any) -> str:
    if not isinstance(plain, str) or len(plain) > MAX_TEXT:
        _refuse(plain, f"a string of at most {MAX_TEXT} characters")
    return plain


def _refuse(plain: Any, expected: str) -> NoReturn:
    raise WireError(f"{brief(plain)} stands where {expected} belongs")
