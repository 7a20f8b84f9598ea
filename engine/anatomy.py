"""What the parts of a decoder layer are, in any family: found by running a tiny twin with data, never by its name.

Owns which module's output holds the queries of each head, which module takes the residual between attention and MLP,
where neurons are before and after their activation. A relation is taken for true when the twin's numbers bear it out at
every token; what bears none out has no name, and a reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.attention import NAME as ENGINE
from engine.experts import is_experts
from engine.own_formula import OwnFormula
from engine.specimen import NUM_TOKENS, Seen, gives_layers_tokens, make_specimen, run_specimen

# T = tokens, H = heads, C = features of a head, D = hidden, W = features of some module's output

_SIDE_BY_SIDE = "attention and MLP of this layer run side by side on resid_pre: nothing lies between them"
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


@dataclass(frozen=True, slots=True)
class Added:
    """What attention or the MLP adds to the residual: a module's output, or the first of its outputs."""

    module: str  # path in the layer; of several that give it, the one with most inside it
    scale: float = 1.0  # so many times it is added
    is_normed: bool = False  # it norms, or changes otherwise, what attention or the MLP gave


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A layer's attention or its MLP: the smallest module with all of it, and who takes and gives its hidden states."""

    module: str  # "": its modules lie in the layer itself
    taken: str | None  # whose input is what it takes
    given: str | None  # whose output is what it gives, without the residual
    added: str | None = None  # whose output is, as it is, what the layer adds to the residual
    note: str | None = None  # what the layer does to that before it adds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Of one kind of layer: paths are in the layer, "" is the layer itself."""

    attention: str | None  # the module that attends
    roles: Mapping[Role, Packed] = field(default_factory=dict)
    out: str | None = None  # takes all heads' results side by side
    mid: str | None = None  # its input is the residual between attention and MLP
    why_no_mid: str = ""
    is_parallel: bool = False  # attention and MLP run side by side
    norm_behind: str | None = None  # of families that norm what attention gave before they add it
    scale: float = 1.0  # of families that scale it then
    attention_adds: Added | None = None
    mlp_adds: Added | None = None
    mlp: str | None = None  # the module that holds the neurons
    act: str | None = None  # its input is the neurons before their activation
    down: str | None = None  # its input is the neurons
    router: tuple[str, tuple[int | str, ...]] | None = None  # whose output, and where in it, has a logit an expert
    experts: str | None = None
    formula: OwnFormula | None = None  # of an attention module that does not attend by the engine's function
    dropout: str | None = None  # the family's own module for dropping attention weights
    attention_block: Block | None = None
    mlp_block: Block | None = None


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
                found[own] = _Layer(layer, f"{key.layers}.{number}", seen).parts()
    return Anatomy(
        kinds=found,
        positions=_positions(twin, seen),
        final_norm=_final_norm(twin, key.layers, seen),
        has_token_values=gives_layers_tokens(twin, key.layers),
    )


def _final_norm(twin: nn.Module, layers: str, seen: Seen) -> str | None:
    """The module behind the layers that takes what the last one gives and gives what the head takes."""
    root: Any = twin
    head = next(path for path, module in twin.named_modules() if module is root.get_output_embeddings())
    taken = next(value for path, side, value in seen.calls if (path, side) == (head, "input"))
    behind = max(place for place, (path, _, _) in enumerate(seen.calls) if path.startswith(f"{layers}."))
    last = _first(seen.calls[behind][2])
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


class _Middle(NamedTuple):
    """Who takes the residual between attention and MLP, or why nobody does, and how attention got into it."""

    module: str | None
    why_not: str
    norm_behind: str | None = None
    scale: float = 1.0
    rows: Tensor | None = None  # the residual that it takes
    attention_adds: Added | None = None
    mlp_adds: Added | None = None


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
        found = [name for name in self.modules if name and inside + name in seen.formulas]
        formulas = {name: seen.formulas[inside + name] for name in found if not _is_below(name, found)}
        self.formula: OwnFormula | None = None
        if not attending and len(formulas) == 1:
            ((own, self.formula),) = formulas.items()
            attending = [own]
        self.attention = attending[0] if len(attending) == 1 else None

    def parts(self) -> Parts:
        """Whatever can be told."""
        experts = next((path for path, module in self.modules.items() if is_experts(module)), None)
        middle = self._middle()
        act, down = self._neurons()
        roles = dict([*self._heads(), *self._fused(act)])
        out = self._out()
        return Parts(
            attention=self.attention,
            roles=roles,
            out=out,
            mid=middle.module,
            why_no_mid=middle.why_not,
            is_parallel=middle.why_not == _SIDE_BY_SIDE,
            norm_behind=middle.norm_behind,
            scale=middle.scale,
            attention_adds=middle.attention_adds,
            mlp_adds=middle.mlp_adds,
            mlp=None if down is None else down.rpartition(".")[0],
            act=act,
            down=down,
            router=None if experts is None else self._router(experts),
            experts=experts,
            formula=self.formula,
            dropout=self._dropout(),
            **self._blocks(middle, roles, out, down, experts),
        )

    # blocks

    def _blocks(
        self, middle: _Middle, roles: Mapping[Role, Packed], out: str | None, down: str | None, experts: str | None
    ) -> dict[str, Block | None]:
        attention, mlp = self._attention_block(middle, roles, out), self._mlp_block(middle, roles, down, experts)
        if middle.why_not == _SIDE_BY_SIDE and attention is not None and mlp is not None:
            sides = ("", "input"), ("", "output"), (attention.given or "", "output"), (mlp.given or "", "output")
            first, last, *given = (own for path, side in sides if (own := self._rows_of(path, side)) is not None)
            if len(given) == 2 and _same(last - first, given[0] + given[1]):
                attention, mlp = replace(attention, added=attention.given), replace(mlp, added=mlp.given)
        return {"attention_block": attention, "mlp_block": mlp}

    def _attention_block(self, middle: _Middle, roles: Mapping[Role, Packed], out: str | None) -> Block | None:
        if self.attention is None:
            return None
        first = self._rows_of("", "input")
        added = None if middle.rows is None or first is None else middle.rows - first
        module = _around([self.attention] if out is None else [self.attention, _owner(out)])
        query = roles.get("q")
        return self._block(module, None if query is None else query.module, out, added, middle)

    def _mlp_block(
        self, middle: _Middle, roles: Mapping[Role, Packed], down: str | None, experts: str | None
    ) -> Block | None:
        last = self._rows_of("", "output")
        added = None if middle.rows is None or last is None else last - middle.rows
        gate = roles["gate"].module if "gate" in roles else None
        inside = [_owner(path) for path in (gate, down, experts) if path is not None]
        if not inside:  # activations that are no modules
            module = None if added is None else self._giver(added)
            return None if module is None else self._block(module, None, None, added, middle)
        if experts is not None and down is not None and not _around(inside):
            return Block(module="", taken=None, given=None)
        return self._block(_around(inside), gate, down, added, middle)

    def _giver(self, added: Tensor) -> str | None:
        """The outermost module with parts of its own whose output is what is added, but for a norm behind it."""
        wanted = added
        path: str
        for path, side, value in reversed(self.calls):
            tensor = _first(value)
            if not path or not isinstance(tensor, Tensor) or not _parallel(_rows(tensor), wanted):
                continue
            if side == "output" and next(self.modules[path].children(), None) is not None:
                return path
            taken = None if _is_matrix(self.modules[path]) else self._rows_of(path, "input")
            if side == "output" and taken is not None and taken.shape == added.shape:
                wanted = taken
        return None

    def _block(
        self, module: str, first: str | None, last: str | None, added: Tensor | None, middle: _Middle
    ) -> Block | None:
        """`first` and `last` take and give where there is no module around all of it."""
        given = self._rows_of(module, "output") if module else None
        if not module:
            own = None if last is None else self._rows_of(last, "output")
            is_added = own is not None and added is not None and _same(own, added)
            return Block(module="", taken=first, given=last, added=last if is_added else None)
        block = Block(module=module, taken=module, given=module)
        if given is None or added is None:
            told = None if middle.why_not == _SIDE_BY_SIDE else "what the layer makes of it could not be told"
            return replace(block, note=told)
        if _parallel(given, added):
            scale = float(added.norm() / given.norm())
            if abs(scale - 1) > 1e-3:
                return replace(block, note=f"before the layer adds {scale:.4g} times it to the residual")
            return replace(block, added=module)
        for path, side, value in self.calls:
            tensor = _first(value)
            if side != "output" or not isinstance(tensor, Tensor) or not _parallel(_rows(tensor), added):
                continue
            exact = path if _same(_rows(tensor), added) else None
            if path.startswith(f"{module}."):
                told = f"{path}.output: what {module} gives has the residual in it"
                return replace(block, given=path, added=exact, note=told)
            own = self._rows_of(path, "input")
            if own is not None and _same(own, given):
                told = f"before {path}, which makes of it what is added to the residual"
                return replace(block, added=exact, note=told)
        return replace(block, note="the layer adds something else to the residual")

    def _rows_of(self, path: str, side: str) -> Tensor | None:
        """What a module took or gave, a row a token; None where that is no such tensor."""
        calls = (_first(value) for called, at, value in self.calls if (called, at) == (path, side))
        tensor = next(calls, None)
        return _rows(tensor) if isinstance(tensor, Tensor) else None

    # attention

    def _heads(self) -> Iterator[tuple[Role, Packed]]:
        """Whose output has each head's queries, keys and values, and where in it."""
        if self.attention is None:
            return
        if self.formula is not None:
            yield from self._heads_of(self.formula)
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
        if self.formula is not None:
            return self._out_of(self.formula)
        z_THC = self.seen.attended[id(self.modules[self.attention])][3]
        for path, side, value in self.calls:
            is_tried = side == "input" and _is_matrix(self.modules[path]) and isinstance(value, Tensor)
            if is_tried and _same(_rows(value), z_THC.flatten(1)):
                return path
        return None

    def _heads_of(self, formula: OwnFormula) -> Iterator[tuple[Role, Packed]]:
        """The same where queries and keys are known by their scores alone, and values by their mixture."""
        out = self._out_of(formula)
        if out is None:
            return
        z_TW = _rows(self._value(out, "input"))
        num_heads = formula.pattern_HTT.shape[0]
        size = z_TW.shape[1] // num_heads
        given = [(path, own) for path, own in self._outputs(within=self.attention) if path != out]
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

    def _out_of(self, formula: OwnFormula) -> str | None:
        """Whose input is the pattern's mixture of features that some other module of the attention gives."""
        for path, side, value in self.calls:
            is_inside = path.startswith(f"{self.attention}.") and _is_matrix(self.modules[path])
            if side == "input" and is_inside and isinstance(value, Tensor) and value.ndim <= 3:
                given = [own for other, own in self._outputs(within=self.attention) if other != path]
                if any(formula.sources(_rows(value), features) is not None for features in given):
                    return path
        return None

    def _dropout(self) -> str | None:
        """Ours is not called by this forward: what the family's eager formula hands attention weights to."""
        if self.attention is None or self.formula is not None:
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
            by_mlp = self._adding(last - rows, added[behind:])
            if by_mlp is not None:
                is_attention = self._is_in_attention(other)
                by_attention = self._adding(rows - first, added[:behind])
                return _Middle(path, "", None if is_attention else other, scale, rows, by_attention, by_mlp)
        once = _of_one_call(added)
        both = [(one, other) for one, a in once for other, b in once if _same(last - first, a + b)]
        if both:
            told = [pair for pair in both if self._is_in_attention(pair[0]) and not self._is_in_attention(pair[1])]
            adds = [Added(path) for path in max(told, key=self._num_inside)] if told else [None, None]
            return _Middle(None, _SIDE_BY_SIDE, None, 1.0, None, *adds)
        return _Middle(None, "no module of this layer takes the sum of resid_pre and what attention gave")

    def _adding(self, change: Tensor, given: list[tuple[str, Tensor]]) -> Added | None:
        """Which of what modules gave the change is a multiple of."""
        found = [(path, rows) for path, rows in _of_one_call(given) if _parallel(change, rows)]
        if not found:
            return None
        path, rows = max(found, key=lambda one: self._num_inside([one[0]]))
        module = self.modules[path]
        is_plain = _is_matrix(module) or isinstance(module, (nn.Dropout, nn.Identity)) or self._num_inside([path]) > 1
        scale = float((change.flatten() @ rows.flatten()) / rows.norm().square())
        return Added(path, scale, is_normed=not is_plain)

    def _num_inside(self, paths: Iterable[str]) -> int:
        return sum(1 for path in paths for _ in self.modules[path].modules())

    def _is_in_attention(self, path: str) -> bool:
        return self.attention is not None and f"{path}.".startswith(f"{self.attention}.")

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
        taken = (value for path, side, value in self.calls if side == "input" and self._is_in_mlp(path))
        downs = [_rows(value) for value in taken if isinstance(value, Tensor)]
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


def _owner(path: str) -> str:
    """The module that has another one as a part of its own."""
    return path.rpartition(".")[0]


def _around(paths: Iterable[str]) -> str:
    """The innermost module that is one of these or has it inside, for each."""
    ways = [path.split(".") for path in paths]
    common: list[str] = []
    for names in zip(*ways, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return ".".join(common)


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


def _of_one_call(given: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What modules gave that were called once: what others gave has no name."""
    calls = Counter(path for path, _ in given)
    return [(path, rows) for path, rows in given if calls[path] == 1]


def _is_below(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


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
