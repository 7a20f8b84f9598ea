"""Requests and results as bytes: one safetensors file each way.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes. A request's constants are its tensors and its
graph is JSON in the header's metadata; a result's saves are its tensors and its receipt is in the metadata. Owns the
layout and every check of it: sizes and offsets are compared with the buffer before memory is taken, and decoding raises
`WireError` or `GraphError`, whatever the bytes are. Knows nothing of models, and of files only that they are buffers.

Version "1" of a request: {"seed", "sharing", "invokes": [[[id, ...], ...], ...], "sites": [[module, port, selector,
visit], ...], "wheres": ["file:line", ...], "nodes": [[kind, where, ...], ...]}, where nodes name sites and lines by
their index.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from polytrace.certificate import Fired, Receipt
from polytrace.codec import brief, from_json, to_json
from polytrace.errors import WireError
from polytrace.grammar import check_graph
from polytrace.graph import Graph, Invoke, Options, Read, Request, Sharing, Write
from polytrace.nodes import decode_nodes, encode_nodes
from polytrace.tensors import DTYPES, NAME_OF_CODE, RawTensor, itemsize, num_bytes

VERSION = "1"
MAX_HEADER_BYTES = 16 << 20
MAX_NODES = 100_000
MAX_DIMS = 32
MAX_TOKEN = 1 << 31
_PREFIX = struct.Struct("<Q")
_RECEIPT_BYTES = 8192  # of a receipt beside its list of what fired


class Facts(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


class Slot(Protocol):
    """A save's place in a result file, as the plan has it."""

    @property
    def name(self) -> str: ...
    @property
    def facts(self) -> Facts: ...
    @property
    def offset(self) -> int: ...


def encode_request(request: Request) -> list[bytes | memoryview]:
    """The file as parts to be written one after another; the constants are borrowed, not copied."""
    nodes, sites, wheres = encode_nodes(request.graph.nodes)
    body = {
        "seed": request.options.seed,
        "sharing": request.options.sharing.value,
        "invokes": [invoke.sequences for invoke in request.invokes],
        "sites": sites,
        "wheres": wheres,
        "nodes": nodes,
    }
    # the widest elements first, so that every tensor begins at a multiple of its element size
    names = sorted(request.constants, key=lambda name: (-itemsize(request.constants[name].dtype), name))
    tensors: dict[str, Any] = {}
    offset = 0
    for name in names:
        tensor = request.constants[name]
        tensors[name] = _entry(tensor.dtype, tensor.shape, offset)
        offset += num_bytes(tensor.dtype, tensor.shape)
    header = _header({"polytrace": VERSION, "request": _dumps(body)}, tensors)
    return [header, *(request.constants[name].data for name in names)]


def decode_request(
    buffer: bytes | bytearray | memoryview, *, max_nodes: int = MAX_NODES, max_header_bytes: int = MAX_HEADER_BYTES
) -> Request:
    """The request in a file; its constants are views of `buffer`, which the caller keeps alive.

    Raises WireError when the bytes are not a request of this version, GraphError when its graph is not well formed.
    """
    body, constants = _decode(buffer, "request", max_header_bytes)
    fields = {"seed", "sharing", "invokes", "sites", "wheres", "nodes"}
    if not isinstance(body, dict) or body.keys() != fields:
        raise WireError(f"a request has exactly the fields {', '.join(sorted(fields))}")
    seed, sharing = body["seed"], body["sharing"]
    if not _is_count(seed, 1 << 63):
        raise WireError("the seed is not an integer from 0 to 2**63 - 1")
    if not isinstance(sharing, str) or sharing not in {member.value for member in Sharing}:
        raise WireError(f"sharing is one of {', '.join(member.value for member in Sharing)}")
    invokes = _invokes(body["invokes"])
    nodes = decode_nodes(body["nodes"], body["sites"], body["wheres"], max_nodes=max_nodes)
    graph = Graph(nodes=nodes)
    check_graph(graph, num_invokes=len(invokes), constants=constants)
    return Request(
        graph=graph, invokes=invokes, constants=constants, options=Options(seed=seed, sharing=Sharing(sharing))
    )


def result_room(saves: Iterable[Slot], graph: Graph) -> int:
    """Bytes to keep free before a result's data for its header, which is written last: a multiple of 64."""
    tensors = {slot.name: _entry(slot.facts.dtype, slot.facts.shape, slot.offset) for slot in saves}
    fired = [
        Fired(site=str(node.site), invoke=node.invoke, kind="write in place", passes=99_999, where=node.where)
        for node in graph.nodes
        if isinstance(node, (Read, Write))
    ]
    metadata = {"polytrace": VERSION, "result": _dumps([to_json(entry) for entry in fired])}
    return math.ceil((len(_header(metadata, tensors)) + _RECEIPT_BYTES) / 64) * 64


def result_header(saves: Iterable[Slot], receipt: Receipt, room: int) -> bytes:
    """The first `room` bytes of a result file whose data begins at `room`, padded with spaces.

    A receipt that does not fit loses its list of what fired and says so in its notes.
    """
    tensors = {slot.name: _entry(slot.facts.dtype, slot.facts.shape, slot.offset) for slot in saves}
    short = replace(receipt, fired=(), notes=("the list of what fired did not fit into the result's header",))
    for candidate in (receipt, short):
        metadata = {"polytrace": VERSION, "result": _dumps(to_json(candidate))}
        header = _header(metadata, tensors, room)
        if len(header) == room:
            return header
    raise ValueError(f"a result's header needs {len(header)} bytes; {room} were kept free")


def decode_result(
    buffer: bytes | bytearray | memoryview, *, max_header_bytes: int = 64 << 20
) -> tuple[dict[str, RawTensor], Receipt]:
    """The saved values of a result file, as views of `buffer`, and its receipt."""
    body, tensors = _decode(buffer, "result", max_header_bytes)
    return tensors, from_json(Receipt, body)


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _entry(dtype: str, shape: tuple[int, ...], offset: int) -> dict[str, Any]:
    """A tensor's line in the header."""
    return {"dtype": DTYPES[dtype][1], "shape": shape, "data_offsets": [offset, offset + num_bytes(dtype, shape)]}


def _header(metadata: Mapping[str, str], tensors: Mapping[str, Any], room: int = 0) -> bytes:
    """Length and header, padded with spaces to `room` bytes, at least to a multiple of 8."""
    text = _dumps({"__metadata__": metadata, **tensors}).encode()
    size = max(room, math.ceil((len(text) + _PREFIX.size) / 8) * 8)
    return _PREFIX.pack(size - _PREFIX.size) + text.ljust(size - _PREFIX.size)


def _decode(buffer: Any, kind: str, max_header_bytes: int) -> tuple[Any, dict[str, RawTensor]]:
    """The parsed JSON of the metadata's `kind` and the tensors, as views of the buffer."""
    view = memoryview(buffer).cast("B")
    if len(view) < _PREFIX.size:
        raise WireError(f"{len(view)} bytes are not a {kind}: the header's length is missing")
    (length,) = _PREFIX.unpack(view[: _PREFIX.size])
    if length > max_header_bytes:
        raise WireError(f"the header has {length} bytes; at most {max_header_bytes} are read")
    if _PREFIX.size + length > len(view):
        raise WireError(f"the file is cut off: {len(view)} bytes, and its header alone has {length}")
    header = _loads(bytes(view[_PREFIX.size : _PREFIX.size + length]), "the header")
    if not isinstance(header, dict) or not isinstance(metadata := header.pop("__metadata__", None), dict):
        raise WireError("the header has no metadata")
    version = metadata.get("polytrace")
    if version != VERSION:
        raise WireError(f"this {kind} is of schema version {brief(version)}; version {VERSION} is spoken here")
    if not isinstance(text := metadata.get(kind), str):
        raise WireError(f"the metadata has no {kind}")
    data = view[_PREFIX.size + length :]
    tensors = {name: _tensor(name, entry, data) for name, entry in header.items()}
    return _loads(text, f"the {kind}"), tensors


def _loads(text: str | bytes, what: str) -> Any:
    """Strict JSON in UTF-8: no NaN, no endless nesting, no unpaired surrogates, no name twice."""
    try:
        raw = text if isinstance(text, str) else text.decode()
        value = json.loads(raw, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if "\\u" in raw:  # escapes can spell strings that UTF-8 cannot
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except WireError:
        raise
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is not JSON: {str(error)[:80]}") from error


def _refuse_constant(name: str) -> None:
    raise WireError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise WireError("a name stands twice in one JSON object")
    return value


def _tensor(name: str, entry: Any, data: memoryview) -> RawTensor:
    """The tensor that a header's line describes, checked against the bytes that are there."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"tensor {brief(name)} needs exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in NAME_OF_CODE:
        raise WireError(f"tensor {brief(name)} has the unknown dtype {brief(code)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(dim, 1 << 48) for dim in shape):
        raise WireError(f"tensor {brief(name)} has no usable shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset, 1 << 62) for offset in offsets):
        raise WireError(f"tensor {brief(name)} has no usable offsets")
    start, stop = offsets
    dtype = NAME_OF_CODE[code]
    if stop - start != num_bytes(dtype, tuple(shape)):
        raise WireError(
            f"tensor {brief(name)} needs {num_bytes(dtype, tuple(shape))} bytes, its offsets give {stop - start}"
        )
    if stop > len(data):
        raise WireError(f"the file is cut off: tensor {brief(name)} ends at byte {stop} of {len(data)}")
    return RawTensor(dtype=dtype, shape=tuple(shape), data=data[start:stop])


def _invokes(plain: Any) -> tuple[Invoke, ...]:
    if not isinstance(plain, list):
        raise WireError("invokes is not a list")
    return tuple(Invoke(sequences=_sequences(sequences, i)) for i, sequences in enumerate(plain))


def _sequences(plain: Any, invoke: int) -> tuple[tuple[int, ...], ...]:
    if not isinstance(plain, list) or not plain:
        raise WireError(f"invoke {invoke} has no prompts")
    for sequence in plain:
        if not isinstance(sequence, list) or not sequence:
            raise WireError(f"invoke {invoke} has a prompt without tokens")
        if not all(_is_count(token, MAX_TOKEN) for token in sequence):
            raise WireError(f"invoke {invoke} has a token that is not an integer from 0 to 2**31 - 1")
    return tuple(tuple(sequence) for sequence in plain)


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit
