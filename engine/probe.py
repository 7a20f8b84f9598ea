"""Finds what a model is made of by running it: two forwards on the meta device with different numbers of rows.

Owns in which manner a model can be run, and what is read off the two forwards: modules, parameters, widths, named
parts, and by `engine.sites` its sites. No family is named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from engine.anatomy import find_anatomy
from engine.arguments import Selector
from engine.encoders import has_encoder
from engine.experts import is_experts
from engine.manners import Manner, attention_of, forward_names, manners_of
from engine.named import Views, name_parts, named_infos, unnamed
from engine.partitions import NamedWeight
from engine.parts import Parts
from engine.positions import first_position
from engine.recorder import LoopError, Recorder
from engine.sites import merged_site, refuse_repeated_visits
from engine.source_sites import SourceGroup, group_sources
from engine.standard import StandardNames
from engine.tape_bytes import TapeBytes, tape_bytes
from engine.windows import Layout, find_layout
from polytrace.description import ModuleInfo, ParameterInfo, PassLayout, PointInfo, SiteInfo
from polytrace.errors import ServiceError
from polytrace.graph import Port
from polytrace.sources import split_operation

# Row counts that no model dimension is likely to have, so that shapes tell rows from features: of the stream, and that
# the head keeps. Where sequences run alone, forwards may be loops over tokens, and positions few.
_PROBES = {PassLayout.PACKED: ((1511, 307), (1523, 311)), PassLayout.PADDED: ((37, 37), (43, 43))}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    tape_bytes: TapeBytes  # of what a layer keeps for gradients
    why_no_gradients: str  # why there are none; empty: there are
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
    found = tuple(merged_site(order, a, b, both, experts) for order, (a, b) in events if not a.is_operation)
    operations = [merged_site(order, a, b, both, experts) for order, (a, b) in events if a.is_operation and a.leaves]
    _check_hidden(model, layers, first)
    everything = sorted((*refuse_repeated_visits(found), *operations), key=lambda site: site.order)
    if not is_packed:  # what came before is in a cache that the model makes itself
        everything = [site for site in everything if not site.port.is_attended]
    named = (
        unnamed(everything, len(_layers_of(model, layers)))
        if has_encoder(model)
        else name_parts(model, layers, everything, manner.attention, dict(_pairs(first, second)))
    )  # puts more between them
    inside = {site.module for site in operations}
    sites = tuple(site for site in named.sites if site.module not in inside)
    operations = [site for site in named.sites if site.module in inside]
    begins: dict[str, int] = {}
    for site in sites:
        if site.port is Port.INPUT:
            begins.setdefault(site.module, site.order)
    stored = dict(named_tensors(model))
    tape_bytes, why_no_gradients = _tape_bytes(model, layers, manner)
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
        tape_bytes=tape_bytes,
        why_no_gradients=why_no_gradients,
        has_side_values=first.has_side_values,
        has_token_values=not has_encoder(model)
        and find_anatomy(model.config, layers, attention_of(model)).has_token_values,
        has_fixed_rows=is_packed and not _takes_other_rows(model, layers),
        widths=frozenset(_widths(first, second)) if is_packed else frozenset(),
        sites=sites,
        sources=group_sources(operations, begins, first.notes, refusals),
        modules=tuple(_modules(model, layers, first)),
        parameters=tuple(
            ParameterInfo(
                path=path, shape=tuple(t.shape), dtype=str(t.dtype).removeprefix("torch."), stage=0, sharded_dim=None
            )
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


def _tape_bytes(model: PreTrainedModel, layers: str, manner: Manner) -> tuple[TapeBytes, str]:
    """What a layer keeps for gradients, and why it has none."""
    try:
        return tape_bytes(model, layers, manner, _max_tokens(model.config.get_text_config())), ""
    except (RuntimeError, TypeError, ValueError, NotImplementedError, ServiceError) as error:
        reason = str(error).split("\n")[0]
        return TapeBytes(row=0), f"its forward does not run with autograd: {reason}"


def _layers_of(model: PreTrainedModel, layers: str) -> nn.ModuleList:
    found = model.get_submodule(layers)
    assert isinstance(found, nn.ModuleList)
    return found


def _max_tokens(config: Any) -> int:
    names = ("max_position_embeddings", "max_seq_len")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), 1 << 20)


def _record_twice(
    model: PreTrainedModel, layers: str, manner: Manner, has_kept_rows: bool
) -> tuple[Recorder, Recorder, Mapping[str, str]]:
    """What two forwards tell, with the operations in them where these can be had; why they cannot, by module."""
    sizes = _PROBES[manner.layout]

    def record(watched: Sequence[str]) -> tuple[Recorder, Recorder]:
        def run(has_mask: bool) -> tuple[Recorder, Recorder]:
            first, second = (
                Recorder(model, layers, manner, watched).run(*own, has_kept_rows, has_mask) for own in sizes
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


def _differing(first: Recorder, second: Recorder) -> set[str]:
    """Modules whose ports, or calls in whose forward, fired in another way in one of two forwards."""

    def fired(recorder: Recorder) -> dict[str, list[tuple[str, Port]]]:
        found: dict[str, list[tuple[str, Port]]] = {}
        for event in recorder.events:
            split = split_operation(event.module, recorder.modules) if event.is_operation else None
            owner = event.module if split is None else split[0]
            found.setdefault(owner, []).append((event.module, event.port))
        return found

    one, other = fired(first), fired(second)
    return {path for path in {*one, *other} if one.get(path) != other.get(path)}


def _pairs(first: Recorder, second: Recorder) -> Iterator[tuple[tuple[str, Port, Selector], int]]:
    """Operations' tensors `[1, heads, rows, rows]`, and their numbers of heads."""
    for a, b in zip(first.events, second.events, strict=True):
        for selector, tensor in a.leaves.items() if a.is_operation else ():
            heads = tensor.shape[1] if tensor.ndim == 4 else 0
            both = ((tensor, first.rows), (b.leaves[selector], second.rows))
            if all(own.shape == (1, heads, rows, rows) for own, rows in both):
                yield (a.module, a.port, selector), heads


def _check_hidden(model: PreTrainedModel, layers: str, recorder: Recorder) -> None:
    """ServiceError unless every layer takes and gives hidden states that have their rows in the second dimension."""
    for event in recorder.events:
        if event.module.rpartition(".")[0] == layers and event.port is not Port.INPUTS:
            shape = next((list(tensor.shape) for tensor in event.leaves.values()), [])
            rows = recorder.decoded if has_encoder(model) else recorder.rows
            if shape[:2] != [1, rows] or len(shape) != 3:
                place = f"{event.module}.{event.port.value}"
                raise ServiceError(
                    f"{type(model).__name__} cannot be served yet: {place} is of shape {shape} and not "
                    f"[1, {rows}, features]"
                )


def _widths(first: Recorder, second: Recorder) -> Iterator[int]:
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


def _modules(model: PreTrainedModel, layers: str, recorder: Recorder) -> Iterator[ModuleInfo]:
    known = layers_of(model)
    for path, module in model.named_modules():
        is_list = isinstance(module, nn.ModuleList)
        refusal = None
        is_dict = isinstance(module, nn.ModuleDict)
        if is_list:
            refusal = "it is a list of modules"
        elif is_dict:
            refusal = "it is a dict of modules"
        elif path in recorder.attending:
            refusal = "it attends, which needs the rows of a pass"
        elif path not in recorder.single_argument:
            refusal = "the model does not call it with one tensor"
        yield ModuleInfo(
            path=path,
            class_name=type(module).__name__,
            is_list=is_list,
            is_decoder_layer=path.rpartition(".")[0] == layers,
            is_layer=path in known,
            first_stage=0,
            call_refusal=refusal,
            is_dict=is_dict,
        )


def layers_of(model: nn.Module) -> set[str]:
    """Paths of the layers of transformers models: modules in a list that attend, or mix tokens in attention's stead.

    Convolutions and their stages in such lists have never given anything but a tensor.
    """
    modules = dict(model.named_modules())
    parts = [path for path, module in modules.items() if isinstance(module, PreTrainedModel)]
    return {
        path
        for path, module in modules.items()
        if isinstance(modules.get(path.rpartition(".")[0]), nn.ModuleList)
        and any(not part or path.startswith(f"{part}.") for part in parts)
        and _mixes_tokens(module)
    }


def _mixes_tokens(module: nn.Module) -> bool:
    names = [type(part).__name__.lower() for part in module.modules()]
    attends = any("attention" in name or "attn" in name for name in names)
    is_other = isinstance(module, GradientCheckpointingLayer)  # FNet's
    return attends or (is_other and not any(isinstance(part, _CONVOLUTIONS) for part in module.modules()))


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every path they have: tied weights are known by each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
