"""Stage windows: the unmodified root forward runs on every stage, with pass-through stubs for what it does not own.

Everything here is found by structure: which list holds the decoder layers, which modules with weights run before the
first layer (embeddings) and after the last one (final norm, head). A probe of the meta model with stubbed layers tells.
A later stage's embeddings answer zeros of the right shape, because its first layer's input is replaced by what it
received; an earlier stage never gets to the norm and the head, because its forward is stopped after its last layer.

Knows nothing of processes, weights files or plans. Touches one private name of transformers
(`config._attn_implementation_internal`): an attention implementation that is not registered makes no masks, and making
them would read the values of meta tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from engine.encoders import has_encoder, why_one_stage
from engine.imaged import image_parts, is_of_text
from polytrace.errors import ServiceError

_DECODER_LAYERS = ("num_decoder_layers", "decoder_layers")  # in configurations of models that have an encoder
_LAYER_MEMBERS = (0, 1, 2, 3)  # what root forwards take from a layer: a tensor, or a tuple of so many
_PROBE_TOKENS = (5, 7)  # two counts: dimensions that differ between the two probes are token dimensions


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The decoder layers [first, stop) that one stage owns."""

    layers: str  # path of the decoder ModuleList
    num_layers: int
    first: int
    stop: int
    stage: int
    stages: int

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputShape:
    """What an embedding answers. A dimension is a size, or ("input", k): dimension k of its first tensor argument."""

    dims: tuple[int | tuple[str, int], ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a model's weights lie in its forward. Modules that are in none of the groups exist on every stage."""

    layers: str
    num_layers: int
    before: Mapping[str, OutputShape]  # modules with weights that run before the first layer: first stage only
    after: tuple[str, ...]  # modules with weights that run after the last layer: last stage only
    seeing: tuple[str, ...]  # modules with weights that make rows of images: first stage only
    layer_members: int  # the root forward takes a tuple of so many from a layer, and of these the first; 0: a tensor
    shares: tuple[
        float, ...
    ]  # of the model's bytes plus its FLOPs: of what runs before, of each layer, of what follows
    why_whole: str | None = None  # why it is not known what runs before and after the layers: one stage only

    def home(self, path: str, stages: int) -> int:
        """The first stage that has the module, parameter or buffer at `path`."""
        layer = self.layer_of(path)
        if layer is not None:
            return next(i for i, owned in enumerate(split_layers(self.shares, stages)) if layer in owned)
        return stages - 1 if self.is_after(path) else 0

    def is_after(self, path: str) -> bool:
        """Whether the path lies in what runs after the last layer."""
        return any(_is_within(path, module) for module in self.after)

    def layer_of(self, path: str) -> int | None:
        """The decoder layer that the path lies in, None when in none."""
        if not path.startswith(f"{self.layers}."):
            return None
        return int(path[len(self.layers) + 1 :].split(".")[0])

    def window(self, stage: int, stages: int) -> Window:
        """ServiceError when the model cannot be cut into so many."""
        if stages > 1 and self.why_whole is not None:
            raise ServiceError(f"{self.why_whole}; use stages=1")
        owned = split_layers(self.shares, stages)[stage]
        return Window(
            layers=self.layers,
            num_layers=self.num_layers,
            first=owned.start,
            stop=owned.stop,
            stage=stage,
            stages=stages,
        )


class PassThrough(nn.Module):
    """Stands for a module that the stage does not own: returns its first argument.

    Carries the plain attributes of the module it replaces: root forwards read `layer_idx`, `attention_type` and such.
    With `members` it returns a tuple of so many, the rest of them None. With `has_parts` it has stubs of the module's
    parts, which are never called: models look for their head inside of one.
    """

    def __init__(self, original: nn.Module, *, members: int = 0, has_parts: bool = False) -> None:
        super().__init__()
        for name, part in original.named_children() if has_parts else ():
            self.add_module(name, PassThrough(part, has_parts=True))
        own = vars(self)
        for name, value in vars(original).items():
            if name not in own and not isinstance(value, Tensor):
                setattr(self, name, value)
        self.members = members

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return (hidden, *[None] * (self.members - 1)) if self.members else hidden


class NoEmbedding(nn.Module):
    """Stands for an embedding on a later stage: zeros of the shape and dtype that the embedding would answer."""

    def __init__(self, shape: OutputShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        sizes = [dim if isinstance(dim, int) else given.shape[dim[1]] for dim in self.shape.dims]
        return torch.zeros(sizes, dtype=self.shape.dtype, device=given.device)


def find_layers(model: nn.Module) -> str:
    """Path of the ModuleList of decoder layers: as long as the configuration says, and heaviest of those."""
    config: Any = model.config
    text = config if has_encoder(model) else config.get_text_config(decoder=True)
    names = (*_DECODER_LAYERS, "num_hidden_layers") if has_encoder(model) else ("num_hidden_layers",)
    num_layers = next(int(found) for name in names if (found := getattr(text, name, None)) is not None)
    lists: list[tuple[int, str]] = [
        (sum(p.numel() for p in module.parameters()), path)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_layers
        and not _is_encoders(model, path)
        and is_of_text(model, module)
    ]
    if not lists:
        name = type(model).__name__
        raise ServiceError(f"{name} has no list of {num_layers} decoder layers, so polytrace cannot serve it")
    _, path = max(lists, key=lambda item: item[0])
    return path


@lru_cache(maxsize=256)
def split_layers(shares: tuple[float, ...], stages: int) -> tuple[range, ...]:
    """The layers of each stage: consecutive, at least one each, so that the heaviest stage is as light as can be.

    `shares` are the weights of what runs before the first layer, of each layer, and of what runs after the last. Of the
    splits with the lightest heaviest stage it is the most even one; of equally even ones, that whose first stages have
    more layers.
    """
    num_layers = len(shares) - 2
    if not 1 <= stages <= num_layers:
        raise ServiceError(f"{num_layers} layers cannot be split into {stages} stages: use 1 to {num_layers}")
    sums = [0.0, *accumulate(shares[1:-1])]

    def weight(first: int, stop: int) -> float:
        ends = (shares[0] if first == 0 else 0.0) + (shares[-1] if stop == num_layers else 0.0)
        return sums[stop] - sums[first] + ends

    # 1) the lightest that the heaviest stage can be: best[stop] is that of the layers before, in so many stages
    best = [math.inf] + [weight(0, stop) for stop in range(1, num_layers + 1)]
    for _ in range(stages - 1):
        best = [math.inf] + [
            min((max(best[first], weight(first, stop)) for first in range(1, stop)), default=math.inf)
            for stop in range(1, num_layers + 1)
        ]
    bound = best[num_layers] * (1 + 1e-9)
    # 2) among the splits within that bound, the smallest sum of squares
    none: tuple[float, tuple[int, ...]] = (math.inf, ())
    squares = [(0.0, none[1])] + [none] * num_layers
    for _ in range(stages):
        longer = [none]
        for stop in range(1, num_layers + 1):
            found = none
            for first in range(stop - 1, -1, -1):
                own = weight(first, stop)
                if own > bound:
                    break
                total = squares[first][0] + own * own
                if total < found[0] * (1 - 1e-9):
                    found = (total, (*squares[first][1], stop))
            longer.append(found)
        squares = longer
    bounds = (0, *squares[num_layers][1])
    return tuple(range(first, stop) for first, stop in pairwise(bounds))


def find_layout(model: nn.Module) -> Layout:
    """Where the weights of a whole meta model lie, by running its forward with stubbed layers. Leaves it unchanged."""
    path = find_layers(model)
    if has_encoder(model):
        return _whole(model, path, why_one_stage(model))
    ways = [(members, has_masks) for has_masks in (False, True) for members in _LAYER_MEMBERS]
    tried = ((way, _probe(model, path, _PROBE_TOKENS[0], *way)) for way in ways)
    way, first = next(((way, found) for way, found in tried if found is not None), (ways[0], None))
    members, _ = way
    second = _probe(model, path, _PROBE_TOKENS[1], *way)
    why_whole = None
    if first is None or second is None:
        why_whole = f"{type(model).__name__} cannot be split: its forward does not run with stubs for layers"
        first, second = {}, {}
    before, after = {}, []
    for module, events in first.items():
        is_before = {event.is_before_layers for event in events}
        if is_before == {True}:
            before[module] = _output_shape(module, events[0], second[module][0])
        elif is_before == {False}:
            after.append(module)
    layers = _as_list(model, path)
    seeing = [own for own in image_parts(model) if first and own not in first]
    return Layout(
        layers=path,
        num_layers=len(layers),
        before=before,
        after=tuple(after),
        seeing=tuple(seeing),
        layer_members=members,
        shares=_shares(model, [[*before, *seeing], *([f"{path}.{index}"] for index in range(len(layers))), after]),
        why_whole=why_whole,
    )


def _whole(model: nn.Module, path: str, reason: str) -> Layout:
    """Of a model that is one stage."""
    layers = _as_list(model, path)
    return Layout(
        layers=path,
        num_layers=len(layers),
        before={},
        after=(),
        seeing=(),
        layer_members=0,
        shares=_shares(model, [[], *([f"{path}.{index}"] for index in range(len(layers))), []]),
        why_whole=reason,
    )


def _is_encoders(model: nn.Module, path: str) -> bool:
    """Whether a path lies in the encoder of a model that has one."""
    return has_encoder(model) and "encoder" in path.split(".")


def token_flops(module: nn.Module, config: Any) -> int:
    """What a module's own weights cost a row: two operations for each that a row meets, none to look a token up.

    Of stacked experts (`[experts, ...]`) a row meets as many as the configuration says.
    """
    if isinstance(module, nn.Embedding):
        return 0
    text = config.get_text_config(decoder=True)
    chosen = next((n for name in _CHOSEN_EXPERTS if isinstance(n := getattr(text, name, None), int)), None)
    flops = 0
    for weight in module._parameters.values():
        if weight is not None and weight.dim() >= 2:
            met = min(1.0, chosen / weight.shape[0]) if chosen is not None and weight.dim() == 3 else 1.0
            flops += int(2 * weight.numel() * met)
    return flops


_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def _shares(model: nn.Module, groups: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """What groups of modules have of the model's bytes and FLOPs, both together."""
    num_bytes, flops = [], []
    for paths in groups:
        roots = [model.get_submodule(path) for path in paths]
        num_bytes.append(sum(parameter.nbytes for root in roots for parameter in root.parameters()))
        flops.append(sum(token_flops(module, model.config) for root in roots for module in root.modules()))
    return tuple(
        own / max(1, sum(num_bytes)) + cost / max(1, sum(flops)) for own, cost in zip(num_bytes, flops, strict=True)
    )


def keep_window(model: nn.Module, window: Window, layout: Layout | None = None) -> None:
    """Put stubs in place of everything with weights that the window does not own. For a whole model on meta."""
    if window.stages == 1:
        return
    layout = layout or find_layout(model)
    layers = _as_list(model, window.layers)
    for index in range(window.num_layers):
        if not window.first <= index < window.stop:
            layers[index] = PassThrough(layers[index], members=layout.layer_members)
    if not window.is_first:
        for path, shape in layout.before.items():
            model.set_submodule(path, NoEmbedding(shape))
        for path in layout.seeing:
            model.set_submodule(path, PassThrough(model.get_submodule(path)))
    if not window.is_last:
        for path in layout.after:
            model.set_submodule(path, PassThrough(model.get_submodule(path), has_parts=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """One call of a module in a probe."""

    is_before_layers: bool
    given: tuple[int, ...] | None  # shape of the first tensor argument
    answered: tuple[int, ...] | None  # shape of the output when it is a tensor
    dtype: torch.dtype | None


def _probe(model: nn.Module, layers: str, tokens: int, members: int, has_masks: bool) -> dict[str, list[_Event]] | None:
    """Calls of the topmost modules with weights beside the layers; None when the forward cannot run with such stubs.

    Most forwards do without masks, some insist on one.
    """
    events: dict[str, list[_Event]] = {}
    shapes_in: list[tuple[int, ...] | None] = []
    layer_list = _as_list(model, layers)
    originals = list(layer_list)

    def watch(path: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = next((tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            is_tensor = isinstance(output, Tensor)
            event = _Event(
                is_before_layers=not shapes_in,
                given=given,
                answered=tuple(output.shape) if is_tensor else None,
                dtype=output.dtype if is_tensor else None,
            )
            events.setdefault(path, []).append(event)

        return module.register_forward_hook(hook, with_kwargs=True)

    def watch_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes_in.append(next((tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None))

    handles = [watch(path, module) for path, module in _beside(model, layers)]
    try:
        for index, layer in enumerate(originals):
            layer_list[index] = PassThrough(layer, members=members)
            handles.append(layer_list[index].register_forward_pre_hook(watch_layer, with_kwargs=True))
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        with torch.no_grad(), nullcontext() if has_masks else _without_masks(model):
            model(input_ids=ids, use_cache=False, **({"attention_mask": torch.ones_like(ids)} if has_masks else {}))
    except (IndexError, RuntimeError, TypeError, ValueError, AttributeError):
        return None
    finally:
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(originals):
            layer_list[index] = layer
    # A root forward that indexes a bare tensor loses a dimension at every layer.
    return events if len(set(shapes_in)) == 1 and len(shapes_in) == len(originals) else None


def _beside(model: nn.Module, layers: str) -> Iterator[tuple[str, nn.Module]]:
    """The topmost modules with weights that neither hold the layers nor lie in them."""
    taken: list[str] = []
    for path, module in model.named_modules():
        holds_layers = not path or _is_within(layers, path)
        if holds_layers or _is_within(path, layers) or any(_is_within(path, parent) for parent in taken):
            continue
        if next(module.parameters(), None) is not None:
            taken.append(path)
            yield path, module


def _output_shape(path: str, short: _Event, long: _Event) -> OutputShape:
    if short.given is None or long.given is None or short.answered is None or long.answered is None:
        raise ServiceError(f"{path} runs before the first layer and does not turn a tensor into a tensor")
    assert short.dtype is not None
    dims: list[int | tuple[str, int]] = []
    for size, other in zip(short.answered, long.answered, strict=True):
        if size == other:
            dims.append(size)
            continue
        source = [k for k, given in enumerate(short.given) if (given, long.given[k]) == (size, other)]
        if not source:
            raise ServiceError(f"{path}: an output dimension follows no dimension of its first input")
        dims.append(("input", source[0]))
    return OutputShape(dims=tuple(dims), dtype=short.dtype)


@contextmanager
def _without_masks(model: nn.Module) -> Iterator[None]:
    """Run with an attention implementation that nobody registered, for which transformers makes no masks."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    kept = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    try:
        for config, _ in kept:
            config._attn_implementation_internal = "polytrace_no_masks"
        yield
    finally:
        for config, implementation in kept:
            config._attn_implementation_internal = implementation


def _as_list(model: nn.Module, path: str) -> nn.ModuleList:
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _is_within(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}.")
