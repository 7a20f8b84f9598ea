"""Where each head's queries, keys, values and result are in what the modules of a layer give.

Attention's own calls tell what each head was given; where a family attends by a formula of its own, scores and mixtures
tell it. What no module's output holds has no place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor, nn

from engine.own_formula import OwnFormula
from engine.parts import Packed, Role
from engine.seen_layer import TOLERANCE, SeenLayer, as_rows, is_matrix, is_same


def find_heads(layer: SeenLayer) -> Iterator[tuple[Role, Packed]]:
    """Whose output has each head's queries, keys and values, and where in it."""
    if layer.attention is None:
        return
    if layer.formula is not None:
        yield from _heads_of(layer, layer.formula)
        return
    query, key, value, _ = layer.seen.attended[id(layer.modules[layer.attention])]
    starts: dict[Role, tuple[str, list[int], int]] = {}
    for role, heads_THC in (("q", query), ("k", key), ("v", value)):
        for path, features_TW in layer.outputs(within=layer.attention):
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


def find_out(layer: SeenLayer) -> str | None:
    """What takes the results of all heads side by side."""
    if layer.attention is None:
        return None
    if layer.formula is not None:
        return _out_of(layer, layer.formula)
    z_THC = layer.seen.attended[id(layer.modules[layer.attention])][3]
    for path, side, value in layer.calls:
        is_tried = side == "input" and is_matrix(layer.modules[path]) and isinstance(value, Tensor)
        if is_tried and is_same(as_rows(value), z_THC.flatten(1)):
            return path
    return None


def find_dropout(layer: SeenLayer) -> str | None:
    """Ours is not called by this forward: what the family's eager formula hands attention weights to."""
    if layer.attention is None or layer.formula is not None:
        return None
    called = {path for path, _, _ in layer.calls}
    own = [
        f"{layer.attention}.{name}"
        for name, module in layer.modules[layer.attention].named_children()
        if isinstance(module, nn.Dropout) and f"{layer.attention}.{name}" not in called
    ]
    return own[0] if len(own) == 1 else None


def _heads_of(layer: SeenLayer, formula: OwnFormula) -> Iterator[tuple[Role, Packed]]:
    """The same where queries and keys are known by their scores alone, and values by their mixture."""
    out = _out_of(layer, formula)
    if out is None:
        return
    z_TW = as_rows(layer.value(out, "input"))
    num_heads = formula.pattern_HTT.shape[0]
    size = z_TW.shape[1] // num_heads
    given = [(path, own) for path, own in layer.outputs(within=layer.attention) if path != out]
    mixed = ((path, own, formula.sources(z_TW, own)) for path, own in given)
    module, features_TW, places = next((one for one in mixed if one[2] is not None), ("", z_TW, None))
    groups = len(set(places or ()))
    if places is None or num_heads % groups:
        return
    counts = {"q": num_heads, "k": groups, "v": groups}
    own_places = places[:: num_heads // groups]

    def heads(role: Role, features: Tensor, packed: Packed) -> Tensor:
        starts = _expected(role, packed.order, counts, groups, size, is_interleaved=packed.is_interleaved)
        return torch.stack([features[:, start : start + size] for start in starts], 1)

    if features_TW.shape[1] == size * (num_heads + 2 * groups):
        for order in permutations(("q", "k", "v")):
            for is_interleaved in (False, True):
                packed = Packed(module, order, is_interleaved)
                is_there = own_places == _expected("v", order, counts, groups, size, is_interleaved=is_interleaved)
                if is_there and formula.is_of(*(heads(role, features_TW, packed) for role in ("q", "k"))):
                    yield from ((role, packed) for role in order)
                    return
    elif features_TW.shape[1] == size * groups and own_places == list(range(0, size * groups, size)):
        yield "v", Packed(module, ("v",))
        for (one, query), (other, key) in permutations([own for own in given if own[0] != module], 2):
            if (query.shape[1], key.shape[1]) == (size * num_heads, size * groups):
                own = Packed(one, ("q",)), Packed(other, ("k",))
                if formula.is_of(heads("q", query, own[0]), heads("k", key, own[1])):
                    yield from (("q", own[0]), ("k", own[1]))
                    return


def _out_of(layer: SeenLayer, formula: OwnFormula) -> str | None:
    """Whose input is the pattern's mixture of features that some other module of the attention gives."""
    for path, side, value in layer.calls:
        is_inside = path.startswith(f"{layer.attention}.") and is_matrix(layer.modules[path])
        if side == "input" and is_inside and isinstance(value, Tensor) and value.ndim <= 3:
            given = [own for other, own in layer.outputs(within=layer.attention) if other != path]
            if any(formula.sources(as_rows(value), features) is not None for features in given):
                return path
    return None


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
    return places.tolist() if float(best.min()) > 1 - TOLERANCE else None
