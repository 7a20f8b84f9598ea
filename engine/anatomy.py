"""What the parts of a decoder layer are, in any family: found by running a tiny twin with data, never by its name.

Owns which module's output holds the queries of each head, which module takes the residual between attention and MLP,
where neurons are before and after their activation. A relation is taken for true when the twin's numbers bear it out at
every token; what bears none out has no name, and a reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.experts import is_experts
from engine.specimen import NUM_TOKENS, Seen, gives_layers_tokens, make_specimen, run_specimen

# T = tokens, H = heads, C = features of a head, D = hidden, W = features of some module's output

_TOLERANCE = 1e-4  # of the largest value, float32
_KEPT = 16  # anatomies, of the configurations that were asked for last

Signature = tuple[tuple[str, str], ...]  # paths in a layer and the names of their classes
Role = str  # "q", "k", "v" of attention; "gate", "up" of an MLP


@dataclass(frozen=True, slots=True)
class Packed:
    """Where a role's features lie in a module's output (or its input, for what is projected back)."""

    module: str  # path in the layer
    order: tuple[Role, ...]  # whose features it holds, one after another; the role alone: all of it
    is_interleaved: bool = False  # ... of the first key/value head, then of the second


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Of one kind of layer: paths are in the layer, "" is the layer itself."""

    attention: str | None  # the module that attends
    roles: Mapping[Role, Packed] = field(default_factory=dict)
    out: str | None = None  # takes all heads' results side by side
    mid: str | None = None  # its input is the residual between attention and MLP
    why_no_mid: str = ""
    norm_behind: str | None = None  # of families that norm what attention gave before they add it
    scale: float = 1.0  # of families that scale it then
    mlp: str | None = None  # the module that holds the neurons
    act: str | None = None  # its input is the neurons before their activation
    down: str | None = None  # its input is the neurons
    router: tuple[str, tuple[int | str, ...]] | None = None  # whose output, and where in it, has a logit an expert
    experts: str | None = None
    dropout: str | None = None  # the family's own module for dropping attention weights


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


def find_anatomy(config: Any, layers: str) -> Anatomy:
    """The parts of every kind of layer that a model of this configuration has; none when it has no tiny twin."""
    text = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _find_anatomy(_Key(text, layers, config))


class _Key:
    """A configuration, equal to others of the same text."""

    def __init__(self, text: str, layers: str, config: Any) -> None:
        self.text, self.layers, self.config = text, layers, config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and (other.text, other.layers) == (self.text, self.layers)

    def __hash__(self) -> int:
        return hash((self.text, self.layers))


@lru_cache(maxsize=_KEPT)
def _find_anatomy(key: _Key) -> Anatomy:
    """The code and the layouts of any family: where something is not as in others, it is served without names."""
    try:
        twin = make_specimen(key.config)
        seen = run_specimen(twin)
    except Exception:  # noqa: BLE001
        return Anatomy()
    found: dict[Signature, Parts] = {}
    listed: Any = twin.get_submodule(key.layers)
    for number, layer in enumerate(listed):
        own = signature(layer)
        if own not in found:
            with suppress(Exception):
                found[own] = _Layer(layer, f"{key.layers}.{number}", seen).parts()
    return Anatomy(
        kinds=found,
        positions=_positions(twin, seen),
        final_norm=_final_norm(twin, key.layers, seen),
        has_token_values=gives_layers_tokens(twin, key.layers),
    )


def _final_norm(twin: nn.Module, layers: str, seen: Seen) -> str | None:
    """The last module behind the layers whose output is the head's input."""
    root: Any = twin
    head = next(path for path, module in twin.named_modules() if module is root.get_output_embeddings())
    taken = next(value for path, side, value in seen.calls if (path, side) == (head, "input"))
    behind = max(place for place, (path, _, _) in enumerate(seen.calls) if path.startswith(f"{layers}."))
    for path, side, value in seen.calls[behind:]:
        is_one = side == "output" and path != head and not list(twin.get_submodule(path).children())
        if is_one and isinstance(value, Tensor) and value.shape == taken.shape and bool((value == taken).all()):
            return path
    return None


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


class _Middle(NamedTuple):
    """Who takes the residual between attention and MLP, or why nobody does, and how attention got into it."""

    module: str | None
    why_not: str
    norm_behind: str | None = None
    scale: float = 1.0


class _Layer:
    """One layer of the twin, and what happened in it."""

    def __init__(self, layer: nn.Module, path: str, seen: Seen) -> None:
        self.modules = dict(layer.named_modules())
        self.seen = seen
        inside = path + "."
        self.calls = [
            (called.removeprefix(inside) if called != path else "", side, value)
            for called, side, value in seen.calls
            if called == path or called.startswith(inside)
        ]
        attending = [name for name, module in self.modules.items() if id(module) in seen.attended]
        self.attention = attending[0] if len(attending) == 1 else None

    def parts(self) -> Parts:
        """Whatever can be told."""
        experts = next((path for path, module in self.modules.items() if is_experts(module)), None)
        middle = self._middle()
        act, down = self._neurons()
        roles = dict([*self._heads(), *self._fused(act)])
        return Parts(
            attention=self.attention,
            roles=roles,
            out=self._out(),
            mid=middle.module,
            why_no_mid=middle.why_not,
            norm_behind=middle.norm_behind,
            scale=middle.scale,
            mlp=None if down is None else down.rpartition(".")[0],
            act=act,
            down=down,
            router=None if experts is None else self._router(experts),
            experts=experts,
            dropout=self._dropout(),
        )

    # attention

    def _heads(self) -> Iterator[tuple[Role, Packed]]:
        """Whose output has each head's queries, keys and values, and where in it."""
        if self.attention is None:
            return
        query, key, value, _ = self.seen.attended[id(self.modules[self.attention])]
        starts: dict[Role, tuple[str, list[int], int]] = {}
        for role, heads_THC in (("q", query), ("k", key), ("v", value)):
            for path, features_TW in self._outputs(within=self.attention):
                places = _places(heads_THC, features_TW)
                if places is not None:
                    starts[role] = path, places, features_TW.shape[1]
                    break
        groups, size = key.shape[1], query.shape[2]
        counts = {"q": query.shape[1], "k": groups, "v": groups}
        for role, (path, places, width) in starts.items():
            beside = sorted((own[0], other) for other, (at, own, _) in starts.items() if at == path)
            order = tuple(other for _, other in beside)
            for is_interleaved in (False, True):
                expected = _expected(role, order, counts, groups, size, is_interleaved=is_interleaved)
                if places == expected and width == size * sum(counts[other] for other in order):
                    yield role, Packed(path, order, is_interleaved)
                    break

    def _out(self) -> str | None:
        if self.attention is None:
            return None
        z_THC = self.seen.attended[id(self.modules[self.attention])][3]
        for path, side, value in self.calls:
            is_tried = side == "input" and _is_matrix(self.modules[path]) and isinstance(value, Tensor)
            if is_tried and _same(_rows(value), z_THC.flatten(1)):
                return path
        return None

    def _dropout(self) -> str | None:
        """Ours is not called by this forward: what the family's eager formula hands attention weights to."""
        if self.attention is None:
            return None
        called = {path for path, _, _ in self.calls}
        own = [
            f"{self.attention}.{name}"
            for name, module in self.modules[self.attention].named_children()
            if isinstance(module, nn.Dropout) and f"{self.attention}.{name}" not in called
        ]
        return own[0] if len(own) == 1 else None

    # the residual

    def _middle(self) -> _Middle:
        first = _rows(next(value for path, side, value in self.calls if (path, side) == ("", "input")))
        last = _rows(_first(next(value for path, side, value in self.calls if (path, side) == ("", "output"))))
        added: list[tuple[str, Tensor]] = []  # what the modules of the layer gave, so far
        candidates: list[tuple[str, str, float, Tensor, int]] = []
        for path, side, value in self.calls:
            tensor = _first(value)
            if path == "" or tensor is None or tensor.numel() != first.numel():
                continue
            rows = _rows(tensor)
            if side == "output":
                added.append((path, rows))
            elif not _same(rows, first):
                giver = next((given for given in added if _parallel(rows - first, given[1])), None)
                if giver is not None:
                    scale = float((rows - first).norm() / giver[1].norm())
                    candidates.append((path, giver[0], scale, rows, len(added)))
        for path, other, scale, rows, behind in candidates:
            if any(_parallel(last - rows, own) for _, own in added[behind:]):
                is_attention = self.attention is not None and f"{other}.".startswith(f"{self.attention}.")
                return _Middle(path, "", None if is_attention else other, scale)
        if any(_same(last - first, one + other) for _, one in added for _, other in added):
            side_by_side = "attention and MLP of this layer run side by side on resid_pre: nothing lies between them"
            return _Middle(None, side_by_side)
        return _Middle(None, "no module of this layer takes the sum of resid_pre and what attention gave")

    # the MLP

    def _neurons(self) -> tuple[str | None, str | None]:
        """The activation, and what projects the neurons back; outside of attention and experts. Both or none."""
        matrices = [
            path
            for path, side, value in self.calls
            if side == "output"
            and self._is_in_mlp(path)
            and _is_matrix(self.modules[path])
            and _first(value) is not None
        ]
        hidden = _rows(self._value("", "input")).shape[1]
        downs = [path for path in matrices if _rows(_first(self._value(path, "output"))).shape[1] == hidden]
        for down in reversed(downs):
            neurons = _rows(self._value(down, "input"))
            for path, side, value in self.calls:
                is_act = side == "output" and self._is_in_mlp(path) and _is_activation(self.modules[path])
                if is_act and isinstance(value, Tensor) and _rows(value).shape == neurons.shape:
                    given = _rows(value)
                    if _same(neurons, given) or any(_same(neurons, given * own) for own in self._linear(neurons)):
                        return path, down
        return None, None

    def _fused(self, act: str | None) -> Iterator[tuple[Role, Packed]]:
        """Whose output the activation is given, and what its result is multiplied with."""
        if act is None:
            return
        before = _rows(self._value(act, "input"))
        width = before.shape[1]
        for path, features in self._outputs(within=None):
            if not (self._is_in_mlp(path) and _is_matrix(self.modules[path])):
                continue
            if features.shape[1] == width and _same(features, before):
                yield "gate", Packed(path, ("gate",))
            elif features.shape[1] == 2 * width and _same(features[:, :width], before):
                yield "gate", Packed(path, ("gate", "up"))
                yield "up", Packed(path, ("gate", "up"))
            elif features.shape[1] == 2 * width and _same(features[:, width:], before):
                yield "gate", Packed(path, ("up", "gate"))
                yield "up", Packed(path, ("up", "gate"))
        after = _rows(self._value(act, "output"))
        downs = [_rows(value) for path, side, value in self.calls if side == "input" and self._is_in_mlp(path)]
        for path, features in self._outputs(within=None):
            is_tried = self._is_in_mlp(path) and _is_matrix(self.modules[path]) and features.shape == after.shape
            if is_tried and any(own.shape == after.shape and _same(own, after * features) for own in downs):
                yield "up", Packed(path, ("up",))

    def _router(self, experts: str) -> tuple[str, tuple[int | str, ...]] | None:
        number = getattr(self.modules[experts], "num_experts", None)
        for path, side, value in self.calls:
            if side == "output" and self._is_in_mlp(path):
                leaves = enumerate(value) if isinstance(value, tuple) else [(None, value)]
                for place, leaf in leaves:
                    if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[-1] == number:
                        return path, () if place is None else (place,)
        return None

    # looking around

    def _value(self, path: str, side: str) -> Any:
        return next(value for called, at, value in self.calls if (called, at) == (path, side))

    def _outputs(self, within: str | None) -> Iterator[tuple[str, Tensor]]:
        for path, side, value in self.calls:
            is_inside = within is None or path.startswith(f"{within}.")
            if side == "output" and is_inside and isinstance(value, Tensor) and value.ndim <= 3:
                yield path, _rows(value)

    def _is_in_mlp(self, path: str) -> bool:
        inside = [f"{other}." for other in (self.attention, self._experts()) if other]
        return path not in ("", self.attention, self._experts()) and not path.startswith(tuple(inside))

    def _experts(self) -> str | None:
        return next((path for path, module in self.modules.items() if is_experts(module)), None)

    def _linear(self, neurons: Tensor) -> Iterable[Tensor]:
        """Features as many as neurons that a matrix gave, halves of larger ones included."""
        width = neurons.shape[1]
        for path, features in self._outputs(within=None):
            if _is_matrix(self.modules[path]) and features.shape[1] in (width, 2 * width):
                yield from features.split(width, 1)


def _expected(
    role: Role, order: tuple[Role, ...], counts: Mapping[Role, int], groups: int, size: int, *, is_interleaved: bool
) -> list[int]:
    """Where each head of a role begins."""
    periods = groups if is_interleaved else 1
    before = sum(counts[other] // periods for other in order[: order.index(role)])
    period, each = sum(counts[other] // periods for other in order), counts[role] // periods
    return [size * (head // each * period + before + head % each) for head in range(counts[role])]


def _places(heads_THC: Tensor, features_TW: Tensor) -> list[int] | None:
    """Where in the features each head's lie, but for a factor; None when not all are there at every token."""
    num_tokens, _, size = heads_THC.shape
    if features_TW.shape[0] != num_tokens or features_TW.shape[1] < size:
        return None
    windows = nn.functional.normalize(features_TW.unfold(1, size, 1), dim=2)  # T x places x C
    heads = nn.functional.normalize(heads_THC, dim=2)
    likeness = torch.einsum("tpc,thc->thp", windows, heads).amin(0)  # at the token where they differ most
    best, places = likeness.max(1)
    return places.tolist() if float(best.min()) > 1 - _TOLERANCE else None


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _is_activation(module: nn.Module) -> bool:
    is_plain = next(module.children(), None) is None and next(module.parameters(), None) is None
    return is_plain and not isinstance(module, (nn.Dropout, nn.Identity))


def _first(value: Any) -> Any:
    """The tensor that a module gives, or the first of several."""
    return value[0] if isinstance(value, tuple) and value else value


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(NUM_TOKENS, -1)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= _TOLERANCE * max(1e-6, float(other.abs().max()))


def _parallel(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same but for one factor over all rows (families scale what they add to the residual)."""
    if one.shape != other.shape or float(one.norm()) < 1e-6 or float(other.norm()) < 1e-6:
        return False
    return float((one.flatten() @ other.flatten()) / (one.norm() * other.norm())) > 1 - _TOLERANCE
