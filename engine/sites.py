"""Finds a model's sites by running it: two forwards on the meta device with different numbers of rows.

Owns how sites are discovered and how a `ModelDescription` is put together from the probe of the whole model and what
each shard reports of its part. A dimension that follows the number of rows in both forwards is the token dimension; a
local shape that is smaller than the full one says which dimension tensor-parallel ranks split. No family is named here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.anatomy import Parts, find_anatomy
from engine.arguments import Arguments, OperationArguments, Selector
from engine.attention import watching
from engine.experts import is_experts
from engine.head_outputs import HeadOutputs
from engine.kernels import why_no_kernels
from engine.lanes import MAX_THREADS, rows_multiple
from engine.manners import Manner, attention_of, forward_names, manners_of
from engine.named import Views, name_parts, named_infos
from engine.operations import watch_operations
from engine.partitions import NamedWeight
from engine.positions import first_position
from engine.relations import Check
from engine.source_sites import SourceGroup, SourceNotes, describe_sources, group_sources
from engine.standard import StandardNames
from engine.windows import Layout, find_layout
from polytrace.description import (
    Leaf,
    Limits,
    ModelDescription,
    ModuleInfo,
    ParameterInfo,
    PassLayout,
    PointInfo,
    Rows,
    SiteInfo,
)
from polytrace.errors import ServiceError
from polytrace.graph import Port
from polytrace.sources import split_operation
from polytrace.tensors import itemsize

# Row counts that no model dimension is likely to have, so that shapes tell rows from features: of the stream, and that
# the head keeps. Where sequences run alone, forwards may be loops over tokens, and positions few.
_PROBES = {PassLayout.PACKED: ((1511, 307), (1523, 311)), PassLayout.PADDED: ((37, 37), (43, 43))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One port of one module as it fired in a forward."""

    module: str
    port: Port
    visit: int
    structure: str
    leaves: Mapping[Selector, Tensor]
    is_operation: bool = False
    keyword: str | None = None  # see `SiteInfo`


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the whole model looks like, without weights."""

    class_name: str
    manner: Manner
    why_padded: str | None  # None: it is packed
    left: tuple[Manner, ...]  # other manners to try should this one turn out wrong
    dtype: str
    config: Mapping[str, Any]
    layout: Layout
    hidden_size: int
    vocab_size: int
    max_tokens: int
    has_kept_rows: bool
    has_side_values: bool  # layers hand values to later layers beside the hidden states
    has_token_values: bool  # layers are given values of embeddings beside the hidden states
    has_fixed_rows: bool  # the root's forward insists on as many rows behind the layers as it was called with
    widths: frozenset[int]  # elements a row has at some port, unsharded
    sites: tuple[SiteInfo, ...]  # stage 0 everywhere; `describe_model` places them
    sources: tuple[SourceGroup, ...]  # calls inside of modules' forwards; their orders lie between those of `sites`
    modules: tuple[ModuleInfo, ...]
    parameters: tuple[ParameterInfo, ...]  # named weights among them
    points: tuple[PointInfo, ...]
    standard: StandardNames
    views: Views  # sites that are parts of other modules' values, or made of them
    weights: tuple[NamedWeight, ...]
    layer_parts: tuple[Parts | None, ...]  # of each layer, as its tiny twin has them
    first_layer_order: int  # orders below are before the decoder layers
    last_layer_order: int  # orders above are after them


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafReport:
    """What a shard's gate saw of one leaf that its stage owns."""

    module: str
    port: Port
    selector: Selector
    local_tail: tuple[int, ...]
    mutated: bool
    refusal: str | None  # why its rows are not the request's own


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What one shard found when it ran the gate."""

    stage: int
    rank: int
    leaves: tuple[LeafReport, ...]
    sharded: Mapping[str, tuple[int, int]]  # parameter held here -> dimension split over the ranks, and its copies
    packed: Mapping[str, int]  # module (its output) or parameter -> number of equal blocks that are split one by one
    row_multiple: int  # see `row_multiple`; the same on every shard
    key_value_bytes: int  # of one row at one layer here, at most
    has_forks: bool  # a fork that changes nothing has its parent's bits, at every site seen here
    has_exact_rows: bool  # False: a row's last bits depend on how many rows run beside it
    notes: tuple[str, ...]
    checks: tuple[Check, ...] = ()  # of standard names, see `engine.checking`


def port_leaves(value: Any) -> tuple[str, dict[Selector, Tensor]]:
    """The structure of a port's value and the tensors in it, two levels deep."""
    if isinstance(value, OperationArguments):
        return "tuple", value.tensors()
    if isinstance(value, Tensor):
        return "tensor", {(): value}
    if isinstance(value, Arguments):
        return "arguments", value.others()
    if isinstance(value, HeadOutputs):
        return "tensor", {(): value.whole()}
    if isinstance(value, Mapping):
        return "dict", dict(_members(value.items()))
    if isinstance(value, (tuple, list)):
        return type(value).__name__ if type(value) in (tuple, list) else "tuple", dict(_members(enumerate(value)))
    return "other", {}


def row_leaves(value: Any, layouts: Mapping[Selector, int]) -> dict[Selector, Tensor]:
    """The tensors of a port, all with their rows in the second dimension; `layouts` says where others have them."""
    return {
        selector: with_rows_second(own, layouts.get(selector, 1)) for selector, own in port_leaves(value)[1].items()
    }


def with_rows_second(tensor: Tensor, dim: int) -> Tensor:
    """The same memory as `[1, rows, ...]`, of a tensor that has its rows in a dimension: 0 where it has no other."""
    return tensor[None] if dim == 0 else tensor.movedim(dim, 1) if dim != 1 and tensor.ndim > dim else tensor


def with_rows_back(tensor: Tensor, dim: int) -> Tensor:
    """The inverse of `with_rows_second`."""
    return tensor[0] if dim == 0 else tensor.movedim(1, dim) if dim != 1 else tensor


def _members(items: Any) -> Iterator[tuple[Selector, Tensor]]:
    for key, member in items:
        if isinstance(member, Tensor):
            yield (key,), member
        elif isinstance(member, (tuple, list)):
            yield from (((key, place), leaf) for place, leaf in enumerate(member) if isinstance(leaf, Tensor))


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the `input` port of a call holds: its first positional argument, else its first keyword argument."""
    return args[0] if args else next(iter(kwargs.values()), None)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every path they have: tied weights are known by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def probe_model(
    model: PreTrainedModel, manners: Sequence[Manner] | None = None, why_padded: str | None = None
) -> Probe:
    """Runs the meta model twice and reads sites, modules and parameters off it: seconds for the largest models.

    In the first of the manners in which it runs, of all by default; `why_padded` is known of those that are missing.
    ServiceError when there is none.
    """
    manners = manners_of(model) if manners is None else manners
    for place, manner in enumerate(manners):
        try:
            return _probe(model, manner, why_padded, tuple(manners[place + 1 :]))
        except ServiceError as error:
            why_padded, last = why_padded or error.message, error
    raise last if why_padded == last.message else ServiceError(f"{last.message} (and packed: {why_padded})")


def _probe(model: PreTrainedModel, manner: Manner, why_padded: str | None, left: tuple[Manner, ...]) -> Probe:
    layout = find_layout(model)
    layers = layout.layers
    manner.prepare(model)
    is_packed = manner.layout is PassLayout.PACKED
    has_kept_rows = is_packed and "logits_to_keep" in forward_names(model)
    first, second, refusals = _record_twice(model, layers, manner, has_kept_rows)
    config = model.config.get_text_config()
    experts = {path for path, module in model.named_modules() if is_experts(module)}
    events = list(enumerate(zip(first.events, second.events, strict=True)))
    both = first, second
    found = tuple(_site(order, a, b, both, experts) for order, (a, b) in events if not a.is_operation)
    operations = [_site(order, a, b, both, experts) for order, (a, b) in events if a.is_operation and a.leaves]
    _check_hidden(model, layers, first)
    everything = sorted((*_refuse_repeated_visits(found), *operations), key=lambda site: site.order)
    named = name_parts(
        model, layers, everything, manner.attention, dict(_pairs(first, second))
    )  # puts more between them
    inside = {site.module for site in operations}
    sites = tuple(site for site in named.sites if site.module not in inside)
    operations = [site for site in named.sites if site.module in inside]
    begins: dict[str, int] = {}
    for site in sites:
        if site.port is Port.INPUT:
            begins.setdefault(site.module, site.order)
    stored = dict(named_tensors(model))
    layer_orders = [s.order for s in sites if s.module.startswith(layers + ".")]
    return Probe(
        class_name=type(model).__name__,
        manner=manner,
        why_padded=None if is_packed else why_padded,
        left=left,
        dtype=str(model.dtype).removeprefix("torch."),
        config=json.loads(model.config.to_json_string(use_diff=False)),
        layout=layout,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_tokens=_max_tokens(config) - first_position(model),
        has_kept_rows=has_kept_rows,
        has_side_values=first.has_side_values,
        has_token_values=find_anatomy(model.config, layers, attention_of(model)).has_token_values,
        has_fixed_rows=is_packed and not _takes_other_rows(model, layers),
        widths=frozenset(_widths(first, second)) if is_packed else frozenset(),
        sites=sites,
        sources=group_sources(operations, begins, first.notes, refusals),
        modules=tuple(_modules(model, layers, first)),
        parameters=tuple(
            ParameterInfo(path=path, shape=tuple(t.shape), dtype=_name(t.dtype), stage=0, sharded_dim=None)
            for path, t in stored.items()
        )
        + tuple(named_infos(named.weights, stored)),
        points=named.points,
        standard=named.standard,
        views=named.views,
        weights=named.weights,
        layer_parts=named.layer_parts,
        first_layer_order=min(layer_orders),
        last_layer_order=max(layer_orders),
    )


def _max_tokens(config: Any) -> int:
    names = ("max_position_embeddings", "max_seq_len")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), 1 << 20)


def _record_twice(
    model: PreTrainedModel, layers: str, manner: Manner, has_kept_rows: bool
) -> tuple[_Recorder, _Recorder, Mapping[str, str]]:
    """What two forwards tell, with the operations in them where these can be had; why they cannot, by module."""
    sizes = _PROBES[manner.layout]

    def record(watched: Sequence[str]) -> tuple[_Recorder, _Recorder]:
        def run(has_mask: bool) -> tuple[_Recorder, _Recorder]:
            first, second = (
                _Recorder(model, layers, manner, watched).run(*own, has_kept_rows, has_mask) for own in sizes
            )
            return first, second

        try:
            return run(has_mask)
        except LoopError:
            raise
        except ServiceError:  # with a mask transformers looks into that, without one for sequences in the data
            if not has_mask:
                raise
            return run(False)

    has_mask = not manner.has_engine_attention and "attention_mask" in forward_names(model)

    every = [path for path, _ in model.named_modules()]
    try:
        first, second = record(every)
        differing = _differing(first, second)
        if not differing:
            return first, second, {}
        refusals = dict.fromkeys(differing, "what its forward calls depends on the prompt's length")
        first, second = record([path for path in every if path not in differing])
        if not _differing(first, second):
            return first, second, refusals
        told = "what this model's forwards call depends on the prompt's length"
    except LoopError:
        raise
    except ServiceError as error:
        told = f"the model does not run with its calls visited ({error.message})"
    first, second = record(())
    if _differing(first, second):
        name = type(model).__name__
        raise ServiceError(f"{name} cannot be served yet: which modules it runs depends on the prompt's length")
    return first, second, dict.fromkeys(every, told)


def _differing(first: _Recorder, second: _Recorder) -> set[str]:
    """Modules whose ports, or calls in whose forward, fired in another way in one of two forwards."""

    def fired(recorder: _Recorder) -> dict[str, list[tuple[str, Port]]]:
        found: dict[str, list[tuple[str, Port]]] = {}
        for event in recorder.events:
            split = split_operation(event.module, recorder.modules) if event.is_operation else None
            owner = event.module if split is None else split[0]
            found.setdefault(owner, []).append((event.module, event.port))
        return found

    one, other = fired(first), fired(second)
    return {path for path in {*one, *other} if one.get(path) != other.get(path)}


def _pairs(first: _Recorder, second: _Recorder) -> Iterator[tuple[tuple[str, Port, Selector], int]]:
    """Operations' tensors `[1, heads, rows, rows]`, and their numbers of heads."""
    for a, b in zip(first.events, second.events, strict=True):
        for selector, tensor in a.leaves.items() if a.is_operation else ():
            heads = tensor.shape[1] if tensor.ndim == 4 else 0
            both = ((tensor, first.rows), (b.leaves[selector], second.rows))
            if all(own.shape == (1, heads, rows, rows) for own, rows in both):
                yield (a.module, a.port, selector), heads


def _check_hidden(model: PreTrainedModel, layers: str, recorder: _Recorder) -> None:
    """ServiceError unless every layer takes and gives hidden states that have their rows in the second dimension."""
    for event in recorder.events:
        if event.module.rpartition(".")[0] == layers and event.port is not Port.INPUTS:
            shape = next((list(tensor.shape) for tensor in event.leaves.values()), [])
            if shape[:2] != [1, recorder.rows] or len(shape) != 3:
                place = f"{event.module}.{event.port.value}"
                raise ServiceError(
                    f"{type(model).__name__} cannot be served yet: {place} is of shape {shape} and not "
                    f"[1, {recorder.rows}, features]"
                )


def _widths(first: _Recorder, second: _Recorder) -> Iterator[int]:
    """Elements that a row has at the ports, however its rows are laid out.

    Behind the head nothing but a soft-cap is left, and vocabularies may be odd. By-products, such as the few weights
    of a router's choice behind its logits, would ask for many rows: where their kernels have tails, the gate sees it.
    """
    rows_a, rows_b = first.rows, second.rows
    for a, b in zip(first.events, second.events, strict=True):
        if a.port.is_inner or a.port is Port.INPUTS or a.is_operation:
            continue
        for place, (selector, tensor) in enumerate(a.leaves.items()):
            other = b.leaves[selector]
            width, rest = divmod(tensor.numel(), rows_a)
            is_by_rows = rest == 0 and other.numel() == width * rows_b
            is_packed = tensor.shape[:2] == (1, rows_a)
            if is_by_rows and (is_packed or (place == 0 and tensor.is_floating_point())):
                yield width


def _takes_other_rows(model: PreTrainedModel, layers: str) -> bool:
    """Whether the root's forward runs on when its last layer hands on fewer rows than it was called with."""

    def shorten(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        return output[:, :-1] if isinstance(output, Tensor) else (output[0][:, :-1], *output[1:])

    decoder_layers = model.get_submodule(layers)
    assert isinstance(decoder_layers, nn.ModuleList)
    handle = decoder_layers[-1].register_forward_hook(shorten)
    ids = torch.zeros(1, _PROBES[PassLayout.PACKED][0][1], dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except RuntimeError:
        return False
    finally:
        handle.remove()
    return True


def describe_model(
    probe: Probe, reports: Sequence[GateReport], *, name: str, stages: int, ranks: int, limits: Limits | None = None
) -> ModelDescription:
    """Places the probe's sites on stages and adds what every shard's gate reported."""
    place = _Placement(probe, stages)
    leaf_reports = {(leaf.module, leaf.port, leaf.selector): leaf for r in reports if r.rank == 0 for leaf in r.leaves}
    packed = {path: blocks for r in reports for path, blocks in r.packed.items()}
    sharded = {path: found for r in reports for path, found in r.sharded.items()}
    sites = tuple(
        replace(
            site,
            stage=place.stage(site),
            leaves=tuple(_placed_leaf(site, leaf, place, leaf_reports, ranks, packed) for leaf in site.leaves),
        )
        for site in probe.sites
    )
    modules = tuple(replace(module, first_stage=place.home(module.path)) for module in probe.modules)
    of_whole = {
        weight.path
        for weight in probe.weights
        if weight.of in sharded and not weight.is_of_parts(sharded[weight.of][0], packed.get(weight.of, 1))
    }
    parameters = tuple(
        replace(
            p,
            stage=place.home(p.of or p.path),
            is_of_whole=p.path in of_whole,
            sharded_dim=dim,
            sharded_copies=copies,
            sharded_blocks=packed.get(p.path, 1),
        )
        for p in probe.parameters
        for dim, copies in (sharded.get(p.path, (None, 1)),)
    )
    codes, sources, source_of = describe_sources(
        probe.sources,
        stages,
        place.stage,
        lambda site, leaf, blocks: _placed_leaf(site, leaf, place, leaf_reports, ranks, {site.module: blocks}),
        packed,
    )
    modules = tuple(replace(module, source=source_of.get(module.path)) for module in modules)
    told = repr((sites, sources))
    shape_facts = json.dumps([probe.config, probe.dtype, stages, ranks, told], sort_keys=True, default=str)
    return ModelDescription(
        name=name,
        class_name=probe.class_name,
        dtype=probe.dtype,
        vocab_size=probe.vocab_size,
        hidden_size=probe.hidden_size,
        num_layers=probe.layout.num_layers,
        layers=probe.layout.layers,
        stages=stages,
        ranks=ranks,
        fingerprint=hashlib.sha256(shape_facts.encode()).hexdigest()[:16],
        config=probe.config,
        modules=modules,
        sites=sites,
        parameters=parameters,
        limits=limits or Limits(max_sequence_tokens=probe.max_tokens),
        key_value_bytes=max(report.key_value_bytes for report in reports),
        hidden_bytes=probe.hidden_size * itemsize(probe.dtype),
        row_multiple=reports[0].row_multiple,
        has_kept_rows=probe.has_kept_rows,
        has_forks=all(report.has_forks for report in reports),
        has_exact_rows=all(report.has_exact_rows for report in reports),
        layout=probe.manner.layout,
        points=probe.points,
        standard=probe.standard.modules,
        not_standard=probe.standard.refusals,
        parts=probe.standard.parts,
        facts=probe.standard.facts,
        notes=tuple(dict.fromkeys(note for r in reports for note in r.notes)),
        codes=codes,
        sources=sources,
    )


def row_multiple(probe: Probe, ranks: int, threads: int, device: str) -> tuple[int, tuple[str, ...]]:
    """The number of rows of which streams must be a multiple so that no thread's share ends inside a vector.

    With it come notes for people: what cannot be promised on this machine. A GPU wants full tiles.
    """
    parts = {width // ranks for width in probe.widths if width % ranks == 0}
    multiple = rows_multiple(probe.widths | parts, threads, torch.device(device))
    if device == "cuda" and (reason := why_no_kernels()) is not None:
        return multiple, (f"attention and experts are slow on this GPU: no kernel can be compiled ({reason})",)
    if device != "cpu" or threads <= MAX_THREADS:
        return multiple, ()
    return multiple, (f"with {threads} threads a CPU may round differently beside neighbours; up to 4 it does not",)


class LoopError(ServiceError):
    """A forward goes from token to token, so it cannot be told where a sequence begins."""


class _Recorder:
    """One forward on the meta device with a hook on every port."""

    def __init__(self, model: PreTrainedModel, layers: str, manner: Manner, watched: Iterable[str]) -> None:
        """`watched` are the modules whose calls are told of."""
        self.model = model
        self.layers = layers
        self.manner = manner
        self.modules = dict(model.named_modules())
        self.notes = SourceNotes(self.modules)
        self._watched = {path: self.modules[path] for path in watched if path in self.modules}
        self.events: list[Event] = []
        self.layer_arguments: set[int] = set()  # ids of tensors that reach layers beside the hidden states
        self.layer_storages: set[int] = set()  # the memory of these
        self.single_argument: set[str] = set()  # modules that were called with one tensor and nothing else
        self.attending: set[str] = set()  # modules that attend, or hold one that does
        self.rows = 0
        self.kept = 0
        self._visits: dict[tuple[str, Port], int] = {}
        self._alive: list[Any] = []  # keeps ids unique
        self._containers: dict[int, tuple[Any, list[int]]] = {}  # given to layers, with the tensors in them at first

    def run(self, rows: int, kept: int, has_kept_rows: bool, has_mask: bool) -> _Recorder:
        self.rows, self.kept = rows, kept
        handles = [handle for path, module in self.model.named_modules() for handle in self._hook(path, module)]
        ids = torch.zeros(1, rows, dtype=torch.long, device="meta")
        given: dict[str, Any] = {}
        if self.manner.layout is PassLayout.PACKED:
            given["position_ids"] = ids
        if has_mask:
            given["attention_mask"] = torch.ones_like(ids)
        if has_kept_rows:
            given["logits_to_keep"] = torch.zeros(kept, dtype=torch.long, device="meta")
        paths = {id(module): path for path, module in self.model.named_modules()}
        try:
            with (
                torch.no_grad(),
                watching(lambda module, port, value: self._record(paths[id(module)], port, value)),
                watch_operations(self._watched, self._record_operation),
            ):
                self.model(input_ids=ids, use_cache=False, **given)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            name, reason = type(self.model).__name__, str(error).split("\n")[0]
            raise ServiceError(
                f"{name} cannot be served yet: its forward does not run without data: {reason}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
        return self

    @property
    def has_side_values(self) -> bool:
        """Whether layers have put tensors into something that later layers are given too."""
        return any(before != [*map(id, _tensors(value))] for value, before in self._containers.values())

    def _hook(self, path: str, module: nn.Module) -> Iterator[Any]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = Arguments(args, kwargs)
            self._record(path, Port.INPUT, first_argument(args, kwargs), arguments.keyword)
            if path and arguments.others():  # what the root gets beside token ids is the engine's own
                self._record(path, Port.INPUTS, arguments)
            others = (*args[1:], *kwargs.values()) if args else (*list(kwargs.values())[1:],)
            tensors = [leaf for value in others for leaf in _tensors(value)]
            if path.rpartition(".")[0] == self.layers:
                self.layer_arguments.update(map(id, tensors))
                self.layer_storages.update(map(_memory, tensors))
                for value in others:
                    if isinstance(value, (MutableMapping, list)):
                        self._containers.setdefault(id(value), (value, [*map(id, _tensors(value))]))
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
                self.single_argument.add(path)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._record(path, Port.OUTPUT, output)

        if hasattr(module, "is_causal"):
            parts = path.split(".")
            self.attending.update(".".join(parts[:depth]) for depth in range(len(parts) + 1))
        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _record_operation(self, path: str, port: Port, value: Any, called: Any) -> None:
        if port is Port.INPUTS:
            self.notes.note(path, called)
        self._record(path, port, value, is_operation=True)

    def _record(
        self, path: str, port: Port, value: Any, keyword: str | None = None, *, is_operation: bool = False
    ) -> None:
        visit = self._visits.get((path, port), 0)
        if self.manner.layout is PassLayout.PACKED and visit > self.rows // 2:
            raise LoopError(f"{type(self.model).__name__} cannot be served in shared passes: {path} loops over tokens")
        self._visits[path, port] = visit + 1
        structure, leaves = port_leaves(value)
        self._alive.append(value)
        self.events.append(
            Event(
                module=path,
                port=port,
                visit=visit,
                structure=structure,
                leaves=leaves,
                is_operation=is_operation,
                keyword=keyword,
            )
        )


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common, without data too."""
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)


def _site(order: int, a: Event, b: Event, recorders: tuple[_Recorder, _Recorder], experts: Iterable[str]) -> SiteInfo:
    """Merges what two forwards saw of one port."""
    recorder = recorders[0]
    kinds = [(Rows.ALL, (recorder.rows, recorders[1].rows)), (Rows.KEPT, (recorder.kept, recorders[1].kept))]
    is_sorted = any(a.module.startswith(f"{path}.") for path in experts)
    in_layers = a.module.startswith(recorder.layers + ".")
    rows: Rows | None = None
    leaves = []
    for selector, tensor in a.leaves.items():
        found = _find_rows(tuple(tensor.shape), tuple(b.leaves[selector].shape), kinds)
        dim, kind, tail = found or (1, rows, ())
        told = [{recorder.rows: "tokens", recorder.kept: "tokens"}.get(size, size) for size in tensor.shape]
        refusal = None if found else f"its rows are not laid out as [1, tokens, ...] but as {told}"
        if a.is_operation and tensor.shape == b.leaves[selector].shape:
            refusal = f"it is {told} for all tokens of all prompts: what a module holds is read by its name there"
        rows = rows or kind
        if kind is not rows:
            refusal = "it has other rows than what stands beside it"
        if is_sorted:
            refusal = "its rows are sorted by expert, not by token"
        write_refusal = refusal
        if refusal is None and _overlaps(tensor):
            write_refusal = "it is an expanded view whose rows share memory"
        if refusal is None and not tensor.is_floating_point():
            write_refusal = "it holds token ids or positions, which the model uses as indices"
        in_place_refusal = None
        is_shared = id(tensor) in recorder.layer_arguments
        if a.is_operation and (is_shared or _memory(tensor) in recorder.layer_storages):
            write_refusal = write_refusal or (_IN_EVERY_LAYER if in_layers else _EVERY_LAYER)
        elif is_shared and a.port is Port.INPUTS:
            in_place_refusal = _SHARED_BY_LAYERS
        elif is_shared:
            write_refusal = write_refusal or _EVERY_LAYER
        leaves.append(
            Leaf(
                selector=selector,
                tail=tail,
                is_flat=dim == 0,
                row_dim=max(dim, 1),
                of_pairs=a.port.is_of_pairs,
                dtype=_name(tensor.dtype),
                read_refusal=refusal,
                write_refusal=write_refusal,
                in_place_refusal=in_place_refusal,
            )
        )
    return SiteInfo(
        module=a.module,
        port=a.port,
        visit=a.visit,
        order=order,
        stage=0,
        structure=a.structure,
        rows=rows or Rows.ALL,
        leaves=tuple(leaves),
        keyword=a.keyword,
    )


def _find_rows(
    a: tuple[int, ...], b: tuple[int, ...], kinds: Sequence[tuple[Rows, tuple[int, int]]]
) -> tuple[int, Rows, tuple[int, ...]] | None:
    """From a tensor's shapes in two forwards: the dimension that follows their rows, which rows, and the others.

    Dimension 0 is of tensors without sequences, as a mixture of experts has them; before any other stands 1.
    """
    for kind, sizes in kinds:
        differing = [dim for dim, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]]
        if len(a) == len(b) and len(differing) == 1:
            (dim,) = differing
            if (a[dim], b[dim]) == sizes and (dim == 0 or a[0] == 1):
                return dim, kind, a[1:dim] + a[dim + 1 :]
    return None


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of expanded views do."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return tensor.numel() > 0
        reach = stride * (size - 1) + reach
    return False


# A marker that `describe_model` turns into a refusal where there are several stages, and clears where there is one.
_EVERY_LAYER = "every layer takes it beside the hidden states"
_IN_EVERY_LAYER = "it shares memory with what every layer takes beside the hidden states"
_SHARED_BY_LAYERS = "every layer is given this tensor: change a copy (`.clone()`), and assign that for this call alone"


def _refuse_repeated_visits(sites: tuple[SiteInfo, ...]) -> tuple[SiteInfo, ...]:
    """A module that runs several times in a forward has sites nobody can name by path alone."""
    repeated = {(site.module, site.port) for site in sites if site.visit > 0}
    reason = "its module runs several times in one forward"
    return tuple(
        replace(
            site,
            leaves=tuple(replace(leaf, read_refusal=reason, write_refusal=reason) for leaf in site.leaves),
        )
        if (site.module, site.port) in repeated
        else site
        for site in sites
    )


def _modules(model: PreTrainedModel, layers: str, recorder: _Recorder) -> Iterator[ModuleInfo]:
    for path, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList)
        refusal = None
        if is_list:
            refusal = "it is a list of modules"
        elif path in recorder.attending:
            refusal = "it attends, which needs the rows of a pass"
        elif path not in recorder.single_argument:
            refusal = "the model does not call it with one tensor"
        yield ModuleInfo(
            path=path,
            class_name=type(module).__name__,
            is_list=is_list,
            is_decoder_layer=path.rpartition(".")[0] == layers,
            first_stage=0,
            call_refusal=refusal,
        )


class _Placement:
    """Which stage owns a site, a module or a parameter."""

    def __init__(self, probe: Probe, stages: int) -> None:
        self.probe = probe
        self.stages = stages

    def is_before_layers(self, site: SiteInfo) -> bool:
        return site.order < self.probe.first_layer_order

    def stage(self, site: SiteInfo) -> int:
        if site.module.startswith(self.probe.layout.layers + "."):
            return self.home(site.module)
        return 0 if self.is_before_layers(site) else self.stages - 1

    def home(self, path: str) -> int:
        return self.probe.layout.home(path, self.stages)


def _placed_leaf(
    site: SiteInfo,
    leaf: Leaf,
    place: _Placement,
    reports: Mapping[tuple[str, Port, Selector], LeafReport],
    ranks: int,
    packed: Mapping[str, int],
) -> Leaf:
    report = reports.get((site.module, site.port, leaf.selector))
    read_refusal, write_refusal = leaf.read_refusal, leaf.write_refusal
    if write_refusal == _EVERY_LAYER:
        write_refusal = None
        if place.stages > 1:
            write_refusal = f"{_EVERY_LAYER}, and the layers are on {place.stages} stages"
    elif place.stages > 1 and place.is_before_layers(site) and leaf.tail != (place.probe.hidden_size,):
        write_refusal = write_refusal or f"it acts before the layers, which are on {place.stages} stages"
    if report is None:
        read_refusal = read_refusal or "the gate did not reach it"
    elif report.refusal is not None:
        read_refusal = report.refusal
    sharded_dim, copies = None, 1
    if report is not None and read_refusal is None and report.local_tail != leaf.tail:
        split = [d for d, (full, part) in enumerate(zip(leaf.tail, report.local_tail, strict=True)) if full != part]
        held, rest = divmod(report.local_tail[split[0]] * ranks, leaf.tail[split[0]])
        if len(split) == 1 and rest == 0 and ranks % held == 0:
            sharded_dim, copies = split[0], held
        else:
            parts, whole = list(report.local_tail), list(leaf.tail)
            read_refusal = f"its parts of shape {parts} on {ranks} ranks do not make up {whole}"
    return replace(
        leaf,
        sharded_dim=sharded_dim,
        sharded_blocks=packed.get(site.module, 1) if site.port is Port.OUTPUT else 1,
        sharded_copies=copies,
        mutated=report.mutated if report else False,
        read_refusal=read_refusal,
        write_refusal=read_refusal or write_refusal,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
