"""Requests and results as bytes: one safetensors file each way.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes. A request's constants are its tensors and its
graph is JSON in the header's metadata; a result's saves are its tensors and its receipt is in the metadata. Owns the
layout and every check of it: sizes and offsets are compared with the buffer before memory is taken, and decoding raises
`WireError` or `GraphError`, whatever the bytes are. Knows nothing of models, and of files only that they are buffers.

Version "2" of a request: {"seed", "sharing", "edits": [name, ...], "prompts": [[id, ...], ...], "invokes": [sizes,
places], "wheres": ["file:line", ...], "templates": [[node with holes, [column, ...]], ...], "order": templates of
nodes}. What repeats stands once: each prompt (invokes have `sizes` prompts each, named by their places in the list),
and each form of node (`polytrace.nodes`). Constants that stand on the service are in "stored" instead of among the
tensors: {name: [dtype, shape, hash or null, state or null]}; "keeps" are the saves that stay there: [[save, name, is a
state, seconds], ...]. "generations" are the ways in which prompts go on, each once, and a column of the place of each
invoke's among them, counted from 1. All three may miss. A prompt has -1 where a row of an image is, and the invoke's
"inputs" the images (`polytrace.image_holes`). In a result's receipt `fired` is {"forms": [[site, kind, line],
...], "order", "invokes", "passes"}: the form, the invoke and the passes of each, as columns (`polytrace.folding`), of a
generation "steps" and "of_steps" too. A content is a file with one tensor.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, Protocol

from polytrace.certificate import Fired, Receipt
from polytrace.codec import brief, from_json, to_json
from polytrace.collector import young_only
from polytrace.contents import is_digest, is_name
from polytrace.errors import WireError
from polytrace.folding import fold, fold_column, size_of, unfold, unfold_column
from polytrace.generation import check_generation, refusals
from polytrace.given_json import decode_inputs, encode_inputs
from polytrace.grammar import check_graph
from polytrace.graph import Generation, Graph, Invoke, KeptSave, Options, Read, Request, Save, Sharing, Write
from polytrace.image_holes import IMAGE_HOLE, with_holes, with_rows
from polytrace.nodes import decode_nodes, encode_nodes
from polytrace.tensors import DTYPES, NAME_OF_CODE, RawTensor, itemsize, num_bytes

VERSION = "2"
HOLE = "_hole"  # what the names of tensors begin with that mean nothing: places of steps that never came
MAX_HEADER_BYTES = 32 << 20
MAX_NODES = 1_000_000
MAX_DIMS = 32
MAX_TOKEN = 1 << 31
MAX_EDITS = 16  # that a request may say it started from: its receipt names them
LABEL = re.compile(r"[ -!#-\[\]-~]{1,80}")  # one's name: what JSON spells as it is
_CONTENT = "content"  # the one tensor of a content's file
_PREFIX = struct.Struct("<Q")
_PASS_BYTES, _ROWS_BYTES = 192, 11  # of a receipt's entry of a pass, and of each layer in it
_RECEIPT_BYTES = 8192  # of a receipt beside its list of what fired
_FIRED_BYTES = 24  # of one that fired beside its form, where nothing repeats
_STEPS_BYTES = 18  # ... and of a generation
_SEQUENCE_BYTES = 160  # of a receipt's entry of a sequence that went on
_TOKEN_BYTES, _NUMBER_BYTES = 12, 28  # of each of its tokens, and of a log-probability


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


def encode_request(request: Request, *, stored: Collection[str] = ()) -> list[bytes | memoryview]:
    """The file as parts to be written one after another; the constants are borrowed, not copied.

    `stored`: names of constants whose content the service has. Those whose bytes are not here need not be told.
    """
    prompts, invokes = _encode_invokes(request.invokes)
    templates, order, wheres = encode_nodes(request.graph.nodes)
    body: dict[str, Any] = {
        "seed": request.options.seed,
        "sharing": request.options.sharing.value,
        "edits": request.options.edits,
        "prompts": prompts,
        "invokes": invokes,
        "wheres": wheres,
        "templates": templates,
        "order": order,
    }
    there = {name: raw for name, raw in request.constants.items() if name in stored or not raw.is_here}
    if there:
        body["stored"] = {name: [raw.dtype, raw.shape, raw.digest, raw.state] for name, raw in there.items()}
    if generations := _encode_generations(request.invokes):
        body["generations"] = generations
    if inputs := encode_inputs(request.invokes):
        body["inputs"] = inputs
    if request.keeps:
        body["keeps"] = [[keep.save, keep.name, keep.is_state, keep.ttl_s] for keep in request.keeps]
    # the widest elements first, so that every tensor begins at a multiple of its element size
    names = sorted(
        request.constants.keys() - there.keys(), key=lambda name: (-itemsize(request.constants[name].dtype), name)
    )
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
    with young_only:
        return _request(*_decode(buffer, "request", max_header_bytes), max_nodes)


def result_room(
    saves: Iterable[Slot], graph: Graph, *, passes: int = 1, num_layers: int = 0, invokes: Sequence[Invoke] = ()
) -> int:
    """Bytes to keep free before a result's data for its header, which is written last: a multiple of 64.

    `passes` are those that the request takes; a receipt tells of each how many rows ran at each layer. `invokes`: those
    of a generation, whose new tokens are in the receipt.
    """
    tensors = {slot.name: _entry(slot.facts.dtype, slot.facts.shape, slot.offset) for slot in saves}
    events = [node for node in graph.nodes if isinstance(node, (Read, Write))]
    forms = {(node.site, type(node), node.where) for node in events}
    fired = {"forms": [[str(site), "write in place", where] for site, _, where in forms]}
    header = _header({"polytrace": VERSION, "result": _dumps(fired)}, tensors)
    room = len(header) + _FIRED_BYTES * len(events) + passes * (_PASS_BYTES + _ROWS_BYTES * num_layers) + _RECEIPT_BYTES
    if any(invoke.generation is not None for invoke in invokes):
        room += _STEPS_BYTES * len(events) + sum(map(_generated_room, invokes))
    return math.ceil(room / 64) * 64


def _generated_room(invoke: Invoke) -> int:
    """Bytes of what a receipt says of an invoke's new tokens, at most."""
    way = invoke.generation
    if way is None:
        return 0
    each = _TOKEN_BYTES
    if way.logprobs is not None:
        each += _NUMBER_BYTES + (_TOKEN_BYTES + _NUMBER_BYTES + 2) * way.logprobs + 3
    return len(invoke.sequences) * (_SEQUENCE_BYTES + each * way.max_new_tokens)


def result_header(saves: Iterable[Slot], receipt: Receipt, room: int) -> bytes:
    """The first `room` bytes of a result file whose data begins at `room`, padded with spaces.

    A receipt that does not fit loses its list of what fired and says so in its notes.
    """
    tensors = {slot.name: _entry(slot.facts.dtype, slot.facts.shape, slot.offset) for slot in saves}
    short = replace(receipt, fired=(), notes=("the list of what fired did not fit into the result's header",))
    for candidate in (receipt, short):
        body = to_json(replace(candidate, fired=())) | {"fired": _encode_fired(candidate.fired)}
        header = _header({"polytrace": VERSION, "result": _dumps(body)}, tensors, room)
        if len(header) == room:
            return header
    raise ValueError(f"a result's header needs {len(header)} bytes; {room} were kept free")


def decode_result(
    buffer: bytes | bytearray | memoryview, *, max_header_bytes: int = 64 << 20
) -> tuple[dict[str, RawTensor], Receipt]:
    """The saved values of a result file, as views of `buffer`, and its receipt."""
    body, tensors = _decode(buffer, "result", max_header_bytes)
    if not isinstance(body, dict) or "fired" not in body:
        raise WireError("a receipt has a list of what fired")
    receipt = from_json(Receipt, body | {"fired": []})
    tensors = {name: raw for name, raw in tensors.items() if not (name.startswith(HOLE) and raw.dtype == "uint8")}
    return tensors, replace(receipt, fired=_fired(body["fired"]))


def content_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What a content's file has before the tensor's bytes: a multiple of 64 bytes."""
    tensors = {_CONTENT: _entry(dtype, shape, 0)}
    metadata = {"polytrace": VERSION, "content": "{}"}
    return _header(metadata, tensors, math.ceil(len(_header(metadata, tensors)) / 64) * 64)


def decode_content(buffer: bytes | bytearray | memoryview) -> RawTensor:
    """The tensor of a content's file, as a view of `buffer`; WireError when it is none, or has anything else in it."""
    _, tensors = _decode(buffer, "content", 1 << 16)
    if tensors.keys() != {_CONTENT}:
        raise WireError("a content is one tensor")
    return tensors[_CONTENT]


def encode_tensors(kind: str, body: Any, tensors: Mapping[str, RawTensor]) -> list[bytes | memoryview]:
    """A file of another kind (a part of a map) with its own JSON, as parts to be written one after another."""
    names = sorted(tensors, key=lambda name: (-itemsize(tensors[name].dtype), name))
    entries: dict[str, Any] = {}
    offset = 0
    for name in names:
        entries[name] = _entry(tensors[name].dtype, tensors[name].shape, offset)
        offset += num_bytes(tensors[name].dtype, tensors[name].shape)
    return [_header({"polytrace": VERSION, kind: _dumps(body)}, entries), *(tensors[name].data for name in names)]


def decode_tensors(
    buffer: bytes | bytearray | memoryview, kind: str, *, max_header_bytes: int = MAX_HEADER_BYTES
) -> tuple[Any, dict[str, RawTensor]]:
    """The JSON and the tensors of such a file, as views of `buffer`."""
    return _decode(buffer, kind, max_header_bytes)


def _request(body: Any, constants: dict[str, RawTensor], max_nodes: int) -> Request:
    fields = {"seed", "sharing", "edits", "prompts", "invokes", "wheres", "templates", "order"}
    if not isinstance(body, dict) or body.keys() - {"stored", "keeps", "generations", "inputs"} != fields:
        raise WireError(f"a request has exactly the fields {', '.join(sorted(fields))}")
    seed, sharing = body["seed"], body["sharing"]
    if not _is_count(seed, 1 << 63):
        raise WireError("the seed is not an integer from 0 to 2**63 - 1")
    if not isinstance(sharing, str) or sharing not in {member.value for member in Sharing}:
        raise WireError(f"sharing is one of {', '.join(member.value for member in Sharing)}")
    edits = body["edits"]
    if not isinstance(edits, list) or len(edits) > MAX_EDITS or not all(_is_label(label) for label in edits):
        raise WireError(f"edits are at most {MAX_EDITS} names of at most 80 plain characters")
    invokes = _invokes(body["prompts"], body["invokes"], max_nodes)
    invokes = _with_generations(body.get("generations"), invokes)
    nodes = decode_nodes(body["templates"], body["order"], body["wheres"], max_nodes=max_nodes)
    graph = Graph(nodes=nodes)
    constants = constants | _stored(body.get("stored", {}), constants)
    if "inputs" in body:
        given = decode_inputs(body["inputs"], len(invokes), constants)
        invokes = tuple([replace(one, inputs=own) for one, own in zip(invokes, given, strict=True)])
    invokes = with_rows(invokes, constants)
    check_graph(graph, num_invokes=len(invokes), constants=constants)
    check_generation(graph, invokes, max_nodes=max_nodes)
    return Request(
        graph=graph,
        invokes=invokes,
        constants=constants,
        options=Options(seed=seed, sharing=Sharing(sharing), edits=tuple(edits)),
        keeps=_keeps(body.get("keeps", []), graph),
    )


def _stored(plain: Any, others: Collection[str]) -> dict[str, RawTensor]:
    """Constants that the service has, without their bytes."""
    if not isinstance(plain, dict):
        raise WireError("stored is an object of constants by name")
    return {name: _named(name, entry, others) for name, entry in plain.items()}


def _named(name: str, entry: Any, others: Collection[str]) -> RawTensor:
    if not isinstance(entry, list) or len(entry) != 4 or name in others:
        raise WireError(f"stored constant {brief(name)} is a dtype, a shape, a hash and a state, and nothing else")
    dtype, shape, digest, state = entry
    if not isinstance(dtype, str) or dtype not in DTYPES or not _is_shape(shape) or not num_bytes(dtype, shape):
        raise WireError(f"stored constant {brief(name)} has no usable dtype and shape")
    if not (is_digest(digest) and state is None) and not (is_name(state) and digest is None):
        raise WireError(f"stored constant {brief(name)} has a hash or a state, one of both")
    return RawTensor(dtype=dtype, shape=tuple(shape), data=memoryview(b""), digest=digest, state=state)


def _keeps(plain: Any, graph: Graph) -> tuple[KeptSave, ...]:
    if not isinstance(plain, list) or not all(isinstance(entry, list) and len(entry) == 4 for entry in plain):
        raise WireError("keeps are lists of a save, a name, whether it is a state, and seconds")
    saves = {node.name for node in graph.nodes if isinstance(node, Save)}
    keeps: list[KeptSave] = []
    for save, name, is_state, ttl_s in plain:
        if not isinstance(save, str) or save not in saves or not is_name(name) or not isinstance(is_state, bool):
            raise WireError(f"there is nothing that could be kept as {brief(name)}")
        saves.remove(save)
        if any(keep.name == name and keep.is_state is is_state for keep in keeps):
            raise WireError(f"two values are to be kept as {brief(name)}")
        if ttl_s is not None and not (type(ttl_s) in (int, float) and 0 < ttl_s < 1 << 40):
            raise WireError(f"{brief(ttl_s)} seconds are no time to keep {brief(name)} for")
        keeps.append(KeptSave(save=save, name=name, is_state=is_state, ttl_s=ttl_s))
    return tuple(keeps)


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
    _check_apart(header)
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
    if not _is_shape(shape):
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


def _check_apart(entries: Mapping[str, Any]) -> None:
    """Checked tensors have bytes of their own: else a small file is as large as it likes. Holes are allowed."""
    spans = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    end, last = 0, ""
    for start, stop, name in spans:
        if start < end and start < stop:
            raise WireError(f"tensors {brief(last)} and {brief(name)} overlap at byte {start}")
        if stop > end:
            end, last = stop, name


def _encode_invokes(invokes: Sequence[Invoke]) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Each prompt once, and the prompts of the invokes: how many each has, and which."""
    prompts: dict[tuple[int, ...], int] = {}
    places = [prompts.setdefault(sequence, len(prompts)) for invoke in invokes for sequence in with_holes(invoke)]
    sizes = fold([len(invoke.sequences) for invoke in invokes])
    return list(prompts), [sizes, fold_column(places) if places else []]


def _invokes(prompts: Any, plain: Any, limit: int) -> tuple[Invoke, ...]:
    """The invokes; equal ones are one object. There are at most `limit` prompts in them."""
    if not isinstance(prompts, list) or not isinstance(plain, list) or len(plain) != 2:
        raise WireError("prompts is a list, and invokes are two columns")
    sequences = [_sequence(prompt, number) for number, prompt in enumerate(prompts)]
    num_invokes = size_of(plain[0], _is_positive, limit)
    sizes = unfold(plain[0], num_invokes, _is_positive)
    total = sum(sizes)
    if total > limit:
        raise WireError(f"the invokes have {total} prompts; at most {limit} are taken")
    column = unfold_column(plain[1], total, 0, len(sequences))
    places = iter([column] * total if isinstance(column, int) else column)
    made = cache(lambda own: Invoke(sequences=tuple([sequences[place] for place in own])))
    return tuple([made(tuple(islice(places, size))) for size in sizes])


def _encode_generations(invokes: Sequence[Invoke]) -> list[Any]:
    """How invokes go on: each way once, and for each invoke its place among them, 0 for one that does not."""
    ways: dict[Generation | None, int] = {None: 0}
    places = [ways.setdefault(invoke.generation, len(ways)) for invoke in invokes]
    return [[to_json(way) for way in ways if way is not None], fold_column(places)] if len(ways) > 1 else []


def _with_generations(plain: Any, invokes: tuple[Invoke, ...]) -> tuple[Invoke, ...]:
    """The invokes with how they go on; equal ones are one object."""
    if plain is None:
        return invokes
    if not isinstance(plain, list) or len(plain) != 2 or not isinstance(plain[0], list) or not invokes:
        raise WireError("generations are a list of ways to go on, and a column of their places")
    ways = [None, *(from_json(Generation, way) for way in plain[0])]
    for way in ways:
        for told in refusals(way) if way is not None else ():
            raise WireError(told)
    column = unfold_column(plain[1], len(invokes), 0, len(ways))
    places = [column] * len(invokes) if isinstance(column, int) else column
    made = cache(lambda number, place: replace(invokes[number], generation=ways[place]))
    firsts: dict[int, int] = {}  # by the object's id: the first place where it stands
    return tuple(
        [
            made(firsts.setdefault(id(one), number), place)
            for number, (one, place) in enumerate(zip(invokes, places, strict=True))
        ]
    )


def _sequence(plain: Any, number: int) -> tuple[int, ...]:
    if not isinstance(plain, list) or not plain:
        raise WireError(f"prompt {number} has no tokens")
    if not (set(map(type, plain)) == {int} and min(plain) >= IMAGE_HOLE and max(plain) < MAX_TOKEN):
        raise WireError(f"prompt {number} has a token that is not an integer from 0 to 2**31 - 1")
    return tuple(plain)


def _encode_fired(fired: Sequence[Fired]) -> dict[str, Any]:
    """What fired: each site, kind and line once, and columns of the rest."""
    forms: dict[tuple[str, str, str], int] = {}
    order = [forms.setdefault((event.site, event.kind, event.where), len(forms)) for event in fired]
    columns: dict[str, list[int]] = {
        "invokes": [event.invoke for event in fired],
        "passes": [event.passes for event in fired],
    }
    if any(event.of_steps != 1 for event in fired):
        columns |= {"steps": [event.steps for event in fired], "of_steps": [event.of_steps for event in fired]}
    return {
        "forms": list(forms),
        "order": fold(order),
        **{name: fold_column(column) if column else [] for name, column in columns.items()},
    }


def _fired(plain: Any) -> tuple[Fired, ...]:
    fields = {"forms", "order", "invokes", "passes"}
    if not isinstance(plain, dict) or plain.keys() not in (fields, fields | {"steps", "of_steps"}):
        raise WireError("what fired has exactly the fields forms, order, invokes and passes, and perhaps steps")
    forms = plain["forms"]
    if not isinstance(forms, list) or not all(_is_form(form) for form in forms):
        raise WireError("a form of what fired is a site, a kind and a line")
    size = size_of(plain["order"], lambda value: _is_count(value, len(forms)), MAX_NODES)
    order = unfold(plain["order"], size, lambda value: _is_count(value, len(forms)))
    names = ("invokes", "passes", "steps", "of_steps")
    columns = [unfold_column(plain.get(name, 1), size, 0, 1 << 31) for name in names]
    rows = zip(order, *([column] * size if isinstance(column, int) else column for column in columns), strict=True)
    made = []
    for form, invoke, passes, steps, of_steps in rows:
        site, kind, where = forms[form]
        made.append(
            Fired(site=site, invoke=invoke, kind=kind, passes=passes, where=where, steps=steps, of_steps=of_steps)
        )
    return tuple(made)


def _is_form(form: Any) -> bool:
    return isinstance(form, list) and len(form) == 3 and all(isinstance(part, str) for part in form)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and LABEL.fullmatch(value) is not None


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_DIMS and all(_is_count(dim, 1 << 48) for dim in value)


def _is_positive(value: Any) -> bool:
    return _is_count(value, 1 << 31) and value > 0


def _is_count(value: Any, limit: int) -> bool:
    return type(value) is int and 0 <= value < limit
