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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polytrace.errors import ServiceError

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
    """Where a model's weights lie in its forward. Modules that are in none of the three groups exist on every stage."""

    layers: str
    num_layers: int
    before: Mapping[str, OutputShape]  # modules with weights that run before the first layer: first stage only
    after: tuple[str, ...]  # modules with weights that run after the last layer: last stage only
    layer_members: int  # the root forward takes a tuple of so many from a layer, and of these the first; 0: a tensor

    def home(self, path: str, stages: int) -> int:
        """The first stage that has the module, parameter or buffer at `path`."""
        if path.startswith(f"{self.layers}."):
            layer = int(path[len(self.layers) + 1 :].split(".")[0])
            return next(i for i, owned in enumerate(split_layers(self.num_layers, stages)) if layer in owned)
        return stages - 1 if any(_is_within(path, module) for module in self.after) else 0

    def window(self, stage: int, stages: int) -> Window:
        owned = split_layers(self.num_layers, stages)[stage]
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
    With `members` it returns a tuple of so many, the rest of them None.
    """

    def __init__(self, original: nn.Module, *, members: int = 0) -> None:
        super().__init__()
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
    num_layers: int = config.get_text_config(decoder=True).num_hidden_layers
    lists: list[tuple[int, str]] = [
        (sum(p.numel() for p in module.parameters()), path)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not lists:
        name = type(model).__name__
        raise ServiceError(f"{name} has no list of {num_layers} decoder layers, so polytrace cannot serve it")
    _, path = max(lists, key=lambda item: item[0])
    return path


def split_layers(num_layers: int, stages: int) -> tuple[range, ...]:
    """The layers of each stage: consecutive, as equal in number as can be, the longer ones first.

    The last stage also runs the head, so it is never one of the longer ones when the count does not divide.
    """
    if not 1 <= stages <= num_layers:
        raise ServiceError(f"{num_layers} layers cannot be split into {stages} stages: use 1 to {num_layers}")
    size, longer = divmod(num_layers, stages)
    bounds = [stage * size + min(stage, longer) for stage in range(stages + 1)]
    return tuple(range(bounds[stage], bounds[stage + 1]) for stage in range(stages))


def find_layout(model: nn.Module) -> Layout:
    """Where the weights of a whole meta model lie, by running its forward with stubbed layers. Leaves it unchanged."""
    path = find_layers(model)
    tried = ((members, _probe(model, path, _PROBE_TOKENS[0], members)) for members in _LAYER_MEMBERS)
    members, first = next(((members, found) for members, found in tried if found is not None), (0, None))
    second = _probe(model, path, _PROBE_TOKENS[1], members)
    if first is None or second is None:
        raise ServiceError(f"{type(model).__name__} cannot be split: its forward does not run with stubs for layers")
    before, after = {}, []
    for module, events in first.items():
        is_before = {event.is_before_layers for event in events}
        if is_before == {True}:
            before[module] = _output_shape(module, events[0], second[module][0])
        elif is_before == {False}:
            after.append(module)
    num_layers = len(_as_list(model, path))
    return Layout(layers=path, num_layers=num_layers, before=before, after=tuple(after), layer_members=members)


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
    if not window.is_last:
        for path in layout.after:
            model.set_submodule(path, PassThrough(model.get_submodule(path)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """One call of a module in a probe."""

    is_before_layers: bool
    given: tuple[int, ...] | None  # shape of the first tensor argument
    answered: tuple[int, ...] | None  # shape of the output when it is a tensor
    dtype: torch.dtype | None


def _probe(model: nn.Module, layers: str, tokens: int, members: int) -> dict[str, list[_Event]] | None:
    """Calls of the topmost modules with weights beside the layers; None when the forward cannot run with such stubs."""
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
        with torch.no_grad(), _without_masks(model):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long, device="meta"), use_cache=False)
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
