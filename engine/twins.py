"""Before a split model serves, a tiny twin of it must give one process's numbers: no plan is trusted.

The twin has the model's own class and configuration with fewer and smaller layers, and what decides how ranks share it
kept: the ratio of query to key/value heads, copies of these, fused matrices, experts, kinds of layers, tied weights. It
is written as a checkpoint, so the two ways to load it are the served model's: all of it by one process, and a rank's
slices through `engine.loading`. Then both run, and every module's input and output must agree in its laid-out part.
Both run backwards as well: where gradients do not agree, the model serves without (`engine.twin_gradients`).

Weights and tokens come from seeds: every rank makes the same twin, and nothing but verdicts and the twin's own sums
travels.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from engine.arguments import Selector
from engine.attention import AttentionPass, use_packed_attention
from engine.experts import is_experts
from engine.gate import root_segment
from engine.imaged import language_class
from engine.leaves import port_leaves
from engine.links import Links, Solo
from engine.loading import LoadedModel, ShardConfig, load_model, meta_model
from engine.operations import watch_operations
from engine.probe import probe_model
from engine.proofs import Proof
from engine.shrinking import shrink, shrink_seeing
from engine.slices import take_part
from engine.source_sites import Place, blocks_of_operation, pattern_of
from engine.spans import SpanStore
from engine.splits import blocks_of
from engine.stage import PackedRows, StageRunner, Visit
from engine.streams import Streams
from engine.trunks import Trunks
from engine.twin_gradients import TOLERANCE as GRADIENT_TOLERANCE
from engine.twin_gradients import agree, run_backwards
from engine.twin_weights import draw_weights
from polytrace.errors import ServiceError
from polytrace.graph import Port
from polytrace.sources import split_operation
from scheduling.plan import MIN_ROWS, PROLOGUE, PassId, Plan

TOLERANCE = 1e-5  # of max(1, max|whole|), in float32
_LENGTHS = (9, 21)  # tokens of two sequences
_STORE_BYTES = 1 << 30
_Seen = dict[tuple[str, Port, Selector], Tensor]
_Made = TypeVar("_Made")


def prove_splits(config: Any, links: Links, device: torch.device) -> Proof | None:
    """Collective over the ranks of a stage. ServiceError, on all of them, when the twin gives other numbers.

    `config` is the served model's. Values of operations that are parts of sums, say, are no error, and neither are
    gradients that differ. None, and nothing to do, for one rank.
    """
    if links.ranks == 1:
        return None
    kind: Any = language_class(config)
    name: str = kind.__name__
    with tempfile.TemporaryDirectory(prefix="polytrace-twin-") as folder:
        part = ShardConfig(source=folder, dtype="float32", device=str(device), rank=links.rank, ranks=links.ranks)

        def make() -> tuple[LoadedModel, _Run]:
            write_twin(twin_of(config, links.ranks), Path(folder))
            alone = load_model(replace(part, rank=0, ranks=1), Solo())
            return alone, _run(alone, device, folder)

        alone, whole = _together(links, make, f"{name} has no tiny twin to prove its split with")
        fails = f"{name} cannot be split over {links.ranks} ranks: a tiny twin of it fails"
        loaded = _together(links, lambda: load_model(part, links), fails)
        local = _together(links, lambda: _run(loaded, device, folder), fails)
    _compare(name, whole.ports, local.ports, loaded, links)
    why, where = _compare_gradients(name, alone, loaded, links, device)
    return Proof(operations=_proven(whole, local, loaded, links), why_no_gradients=why, no_gradients=where)


def _compare_gradients(
    name: str, alone: LoadedModel, loaded: LoadedModel, links: Links, device: torch.device
) -> tuple[str, frozenset[Place]]:
    """Why there are no gradients, "" when there are, and the places that have none all the same."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = alone.model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(1, vocabulary, (_LENGTHS[1],), generator=generator).tolist()
    try:
        fails = f"a tiny twin of {name} cannot be run backwards"
        whole = _together(links, lambda: run_backwards(alone.model, Solo(), tokens, device), fails)
        fails = f"{fails} by {links.ranks} ranks"
        local = _together(links, lambda: run_backwards(loaded.model, links, tokens, device), fails)
    except ServiceError as error:
        return error.message, frozenset()
    layers = [f"{loaded.window.layers}.{number}" for number in range(loaded.window.num_layers)]
    embeddings = next(path for path, one in loaded.model.named_modules() if one is loaded.model.get_input_embeddings())
    modules = frozenset(path for path, _ in loaded.model.named_modules())
    found = agree(whole, local, links, blocks_of(loaded.splits), modules, [embeddings, *layers])
    if found.error <= GRADIENT_TOLERANCE:
        return "", found.wrong
    return (
        f"a tiny twin of {name} has other gradients over {links.ranks} ranks than in one process, at "
        f"{found.worst}.output by {found.error:.1e} of the largest: {_WAY_OUT}"
    ), frozenset()


def _together(links: Links, make: Callable[[], _Made], complaint: str) -> _Made:
    """What `make` returns; ServiceError on every rank when it fails on one, so that none waits for another."""
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not be left waiting
        failure = error
    flag = torch.tensor([failure is not None], dtype=torch.uint8)
    if bool(links.gather(flag, 0).any()):
        told = "it does on another rank" if failure is None else _first_line(failure)
        raise ServiceError(f"{complaint} ({told}): {_WAY_OUT}") from failure
    return made


_WAY_OUT = "use ranks=1 and split it into stages instead"


def _compare(name: str, whole: _Seen, local: _Seen, loaded: LoadedModel, links: Links) -> None:
    blocks = blocks_of(loaded.splits)
    errors = [
        _error(tensor, local.get(place), blocks.get(place[0], 1) if place[1] is Port.OUTPUT else 1, links)
        for place, tensor in whole.items()
    ]
    device = next(iter(whole.values())).device
    worst = links.gather(torch.tensor([errors], device=device), 0).amax(0).tolist()
    for (module, port, _), error in zip(whole, worst, strict=True):
        if not error <= TOLERANCE:
            raise ServiceError(
                f"{name} cannot be split over {links.ranks} ranks: a tiny twin of it gives other numbers than one "
                f"process, first at {module or 'its logits'}.{port.value}, by {error:.1e} of the largest: {_WAY_OUT}"
            )


def _error(whole: Tensor, local: Tensor | None, blocks: int, links: Links) -> float:
    """The largest difference, relative to the largest value where that is above 1; of this rank's part."""
    if local is None or local.ndim != whole.ndim:
        return math.inf
    differing = [dim for dim in range(whole.ndim) if local.shape[dim] != whole.shape[dim]]
    if len(differing) > 1:
        return math.inf
    part = whole
    for dim in differing:
        copies, rest = divmod(local.shape[dim] * links.ranks, whole.shape[dim])
        if rest or copies == 0 or links.ranks % copies:
            return math.inf
        part = take_part(links, whole, dim, blocks, copies)
    if whole.numel() == 0:
        return 0.0
    if whole.is_complex() and local.is_complex():
        part, local, whole = torch.view_as_real(part), torch.view_as_real(local), torch.view_as_real(whole)
    scale = max(1.0, whole.double().abs().max().item())
    return (part.double() - local.double()).abs().max().item() / scale


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What a twin's forward showed, in its order."""

    ports: _Seen  # of modules; not of those inside experts, who sort rows
    operations: _Seen  # of calls inside of their forwards
    calls: Mapping[str, str]  # operations that call a module -> its path
    modules: frozenset[str]


def _proven(whole: _Run, local: _Run, loaded: LoadedModel, links: Links) -> frozenset[Place]:
    """The operations' values whose parts agree on all ranks, wherever in the twin a place occurs."""
    packed = blocks_of(loaded.splits)
    places: list[Place] = []
    errors = []
    for (path, port, selector), tensor in whole.operations.items():
        split = split_operation(path, whole.modules)
        assert split is not None, "operations are told below their modules"
        module, way = split
        blocks = blocks_of_operation(port, module, whole.calls.get(path), packed)
        places.append((pattern_of(module), way, port, selector))
        errors.append(_error(tensor, local.operations.get((path, port, selector)), blocks, links))
    if not errors:
        return frozenset()
    device = next(iter(whole.operations.values())).device
    worst = links.gather(torch.tensor([errors], device=device), 0).amax(0).tolist()
    return frozenset(places) - {place for place, error in zip(places, worst, strict=True) if not error <= TOLERANCE}


def _run(loaded: LoadedModel, device: torch.device, folder: str) -> _Run:
    model = loaded.model
    use_packed_attention(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = [torch.randint(1, vocabulary, (length,), generator=generator).tolist() for length in _LENGTHS]
    num_layers = loaded.window.num_layers
    plan = Plan(
        pass_id=PassId(-1),
        segments=tuple(root_segment(sequence, num_layers) for sequence in tokens),
        layer_rows=(0,) * num_layers,
        views=(),
        members=(),
        keeps=(),
        until=PROLOGUE,
        num_stages=1,
    )
    streams, store = Streams(plan, MIN_ROWS, device, is_fixed=False), SpanStore(_STORE_BYTES)
    rows = PackedRows(
        streams=streams, attention=AttentionPass(PassId(-1), store, device), trunks=Trunks(streams, store)
    )
    seen: _Seen = {}
    inside = tuple(f"{path}." for path, module in model.named_modules() if is_experts(module))

    def seeing(path: str, port: Port) -> Any:
        def visitor(value: Any) -> Any:
            for selector, tensor in port_leaves(value)[1].items():
                seen.setdefault((path, port, selector), tensor.clone())
            return value

        return visitor

    visits = [
        Visit(order=order, module=path, port=port, visitor=seeing(path, port))
        for order, (path, port) in enumerate(
            (path, port)
            for path, _ in model.named_modules()
            for port in Port
            if port not in (Port.INPUTS, Port.TOKEN) and not path.startswith(inside)
        )
    ]
    operations: _Seen = {}
    calls: dict[str, str] = {}
    paths = {module: path for path, module in model.named_modules()}

    def telling(path: str, port: Port, value: Any, called: Any) -> None:
        if isinstance(called, torch.nn.Module) and called in paths:
            calls[path] = paths[called]
        for selector, tensor in port_leaves(value)[1].items():
            operations.setdefault((path, port, selector), tensor.clone())

    views = probe_model(meta_model(folder)).views
    with watch_operations({path: module for module, path in paths.items() if not path.startswith(inside)}, telling):
        StageRunner(model, loaded.window, keeps_rows=False, views=views).run(rows, None, visits, stop_after=None)
    return _Run(ports=seen, operations=operations, calls=calls, modules=frozenset(paths.values()))


def twin_of(config: Any, ranks: int) -> PreTrainedModel:
    """On the CPU, with weights that make differences large."""
    small = copy.deepcopy(config)
    shrink(small, ranks)
    shrink_seeing(small)
    kind: Any = language_class(small)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = kind._from_config(small, dtype=torch.float32).eval()
        draw_weights(model)
    return model


def write_twin(model: PreTrainedModel, folder: Path) -> None:
    """As a checkpoint. Not by `save_pretrained`, which writes on the first process of a world only."""
    tied = model.all_tied_weights_keys
    state = {path: tensor.contiguous() for path, tensor in model.state_dict().items() if path not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_told(model.config)))


def _told(config: Any) -> dict[str, Any]:
    """A configuration as its file would say it, with the plans that transformers reads there and does not write."""
    told: dict[str, Any] = json.loads(config.to_json_string())
    told |= {name: vars(config)[name] for name in ("base_model_tp_plan", "base_model_ep_plan") if name in vars(config)}
    told |= {name: _told(value) for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}
    return told


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
