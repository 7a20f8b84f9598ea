"""What the parts of a decoder layer are, in any family: found by running a tiny twin with data, never by its name.

Owns which kinds of layers a model has, what each is made of, and what is around them. A relation is taken for true when
the twin's numbers bear it out at every token; what bears none out has no name, and a reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from engine.attention import NAME as ENGINE
from engine.blocks import find_blocks
from engine.heads import find_dropout, find_heads, find_out
from engine.neurons import find_fused, find_neurons, find_router
from engine.parts import Parts
from engine.residual import SIDE_BY_SIDE, find_middle
from engine.seen_layer import SeenLayer, first_tensor
from engine.specimen import Seen, gives_layers_tokens, make_specimen, run_specimen

_KEPT = 16  # anatomies, of the configurations that were asked for last

Signature = tuple[tuple[str, str], ...]  # paths in a layer and the names of their classes


def signature(layer: nn.Module) -> Signature:
    """What tells kinds of layers apart."""
    return tuple((path, type(module).__name__) for path, module in layer.named_modules() if path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Of a model."""

    kinds: Mapping[Signature, Parts] = field(default_factory=dict)  # of layers
    positions: tuple[str, int] | None = None  # the embedding of positions, and its row for position 0
    final_norm: str | None = None  # behind all layers, gives what the head takes
    has_token_values: bool = False  # layers are given values of embeddings beside the hidden states


def find_anatomy(config: Any, layers: str, attention: str = ENGINE) -> Anatomy:
    """The parts of every kind of layer that a model of this configuration has; none when it has no tiny twin.

    `attention` is the implementation by which the model attends, the engine's by default.
    """
    text = json.dumps([config.to_dict(), attention], sort_keys=True, default=str)
    return _find_anatomy(_Key(text, layers, config, attention))


class _Key:
    """A configuration, equal to others of the same text."""

    def __init__(self, text: str, layers: str, config: Any, attention: str) -> None:
        self.text, self.layers, self.config, self.attention = text, layers, config, attention

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (other.text, other.layers) == (self.text, self.layers)

    def __hash__(self) -> int:
        return hash((self.text, self.layers))


@lru_cache(maxsize=_KEPT)
def _find_anatomy(key: _Key) -> Anatomy:
    """The code and the layouts of any family: where something is not as in others, it is served without names."""
    seen = None
    for keeps_heads in (False, True):
        with suppress(Exception):
            twin = make_specimen(key.config, key.attention, keeps_heads=keeps_heads)
            seen = run_specimen(twin)
            break
    if seen is None:
        return Anatomy()
    found: dict[Signature, Parts] = {}
    listed: Any = twin.get_submodule(key.layers)
    for number, layer in enumerate(listed):
        own = signature(layer)
        if own not in found:
            with suppress(Exception):
                found[own] = _parts(SeenLayer(layer, f"{key.layers}.{number}", seen))
    return Anatomy(
        kinds=found,
        positions=_positions(twin, seen),
        final_norm=_final_norm(twin, key.layers, seen),
        has_token_values=gives_layers_tokens(twin, key.layers),
    )


def _parts(layer: SeenLayer) -> Parts:
    """Whatever can be told."""
    experts = layer.experts()
    middle = find_middle(layer)
    act, down = find_neurons(layer)
    roles = dict([*find_heads(layer), *find_fused(layer, act)])
    out = find_out(layer)
    return Parts(
        attention=layer.attention,
        roles=roles,
        out=out,
        mid=middle.module,
        why_no_mid=middle.why_not,
        is_parallel=middle.why_not == SIDE_BY_SIDE,
        norm_behind=middle.norm_behind,
        scale=middle.scale,
        attention_adds=middle.attention_adds,
        mlp_adds=middle.mlp_adds,
        mlp=None if down is None else down.rpartition(".")[0],
        act=act,
        down=down,
        router=None if experts is None else find_router(layer, experts),
        experts=experts,
        formula=layer.formula,
        dropout=find_dropout(layer),
        **find_blocks(layer, middle, roles, out, down, experts),
    )


def _final_norm(twin: nn.Module, layers: str, seen: Seen) -> str | None:
    """The module behind the layers that takes what the last one gives and gives what the head takes."""
    root: Any = twin
    head = next(path for path, module in twin.named_modules() if module is root.get_output_embeddings())
    taken = next(value for path, side, value in seen.calls if (path, side) == (head, "input"))
    behind = max(place for place, (path, _, _) in enumerate(seen.calls) if path.startswith(f"{layers}."))
    last = first_tensor(seen.calls[behind][2])
    takes = {path for path, side, value in seen.calls[behind:] if side == "input" and _is_equal(value, last)}
    for path, side, value in seen.calls[behind:]:
        is_one = path in takes and side == "output" and path != head and not list(twin.get_submodule(path).children())
        if is_one and _is_equal(value, taken):
            return path
    return None


def _is_equal(value: Any, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == other.shape and bool((value == other).all())


def _positions(twin: nn.Module, seen: Seen) -> tuple[str, int] | None:
    """Every token of the twin is at position 0."""
    root: Any = twin
    for path, side, value in seen.calls:
        module = twin.get_submodule(path)
        if side == "output" and isinstance(module, nn.Embedding) and module is not root.get_input_embeddings():
            row = value.reshape(-1, value.shape[-1])[0]
            places = (module.weight == row).all(1).nonzero().flatten().tolist()
            if places:
                return path, places[0]
    return None
