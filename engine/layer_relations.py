"""What must be true of the named values of one decoder layer, in any family.

Owns which relations there are between names, what each says in words, and which name is to blame when one fails. What
attention and the MLP add to the residual is taken from the anatomy, and a module that gives the residual with it, a
factor or a norm on the way is told as such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.links import Links
from engine.named import NamedParameters
from engine.parts import Added, Parts
from engine.relations import Check, Measured, equal, factor_of, softmax_of, sum_of, sum_of_parts, weighted_sum
from polytrace.description import Outcome
from polytrace.tree import join

# R = rows, H = query heads, G = key/value heads, K = positions of keys, C = features of a head, D = hidden, N = neurons

_STREAM = (
    "resid_pre", "resid_mid", "resid_post", "attention_input", "attention_output", "mlp_input", "mlp_output",
)  # fmt: skip
_PLAIN = 1e-3  # a factor so near to 1 is one
_NOT_HERE = "not all of its sides can be read here"


Call = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerValues:
    """What the base's rows were at the names of a layer, on one rank, and beside them what relations need."""

    path: str
    layer: int
    parts: Parts | None
    names: frozenset[str]  # that can be read
    values: Mapping[str, Tensor]  # by name; "input:way" and "output:way" are sides of modules in the layer
    sinks: Tensor | None  # [H], of attention
    strays: Mapping[str, list[int]]  # heads that another first head of a name changed
    hidden_size: int

    def output(self, way: str | None) -> Tensor | None:
        """What a module of the layer gave."""
        return None if way is None else self.values.get(f"output:{way}")


def layer_checks(
    values: LayerValues, model: nn.Module, parameters: NamedParameters, links: Links, call: Call
) -> Iterator[Check]:
    """Collective over the ranks of a stage. `call` applies a module of the model to rows `[1, R, ...]`."""
    summed = _summed(values, model, parameters, links)
    yield from _shapes(values)
    yield from _attention(values)
    yield from summed
    yield from _residual(values, call)


def _check(values: LayerValues, names: str, says: str, found: Measured | None, blames: str | None = None) -> Check:
    """Of names and blamed names, blank between; a missing measurement is one that could not be made."""
    found = found or Measured(outcome=Outcome.UNCHECKED, told=_NOT_HERE)
    own = tuple(names.split())
    return Check(
        layer=values.layer,
        names=own,
        says=says,
        outcome=found.outcome,
        error=found.error,
        told=found.told,
        blames=own[:1] if blames is None else tuple(blames.split()),
    )


# shapes


def _shapes(values: LayerValues) -> Iterator[Check]:
    """Of what lies in the rows here: the whole is made up of these, as `engine.placing` finds."""
    shape = {name: list(value.shape[1:]) for name, value in values.values.items() if name in values.names}
    expected: dict[str, tuple[str, list[int]]] = {name: ("[hidden_size]", [values.hidden_size]) for name in _STREAM}
    if "q_rot" in shape:
        heads = shape["q_rot"][:1]
        expected |= {
            "scores": ("[heads, keys]", heads),
            "pattern": ("[heads, keys]", heads),
            "z": ("[heads, ...]", heads),
        }
        if "head_out" in shape:  # of a rank's own heads, also where every rank attends with all
            own = shape["head_out"][0]
            heads = [own] if heads[0] % own == 0 else heads
            expected["head_out"] = ("[heads, hidden_size]", [*heads, values.hidden_size])
    for name, other in (("mlp_pre", "mlp_post"), ("mlp_post", "mlp_pre")):
        if other in shape:
            expected[name] = (f"as wide as {other}", shape[other])
    for name, (says, sizes) in expected.items():
        if name in shape:
            is_right = shape[name][: len(sizes)] == sizes
            told = None if is_right else f"it is {shape[name]} and not {sizes}"
            found = Measured(outcome=Outcome.HOLDS if is_right else Outcome.FAILS, told=told)
            yield _check(values, name, f"a row is {says}", found)


# attention


def _attention(values: LayerValues) -> Iterator[Check]:
    pattern, scores, z, v = (values.values.get(name) for name in ("pattern", "scores", "z", "v"))
    if pattern is not None and scores is not None:
        sink = " with a sink" if values.sinks is not None else ""
        found = softmax_of(pattern, scores, values.sinks)
        yield _check(values, "pattern scores", f"pattern = softmax(scores){sink}", found, "pattern")
        if pattern is not None and z is not None and v is not None:
            yield _check(values, "z pattern v", "z = pattern @ v", weighted_sum(z, pattern, v), "z pattern")
    for name, new in (("keys", "k_rot"), ("values", "v")):
        every, own = values.values.get(name), values.values.get(new)
        if every is not None and own is not None:
            yield _check(values, f"{name} {new}", f"of a prompt {name} = {new}", equal(every, own), name)
    for name, heads in values.strays.items():
        taken, behind = values.values.get(name), values.values.get(f"{name}_rot")
        if taken is None or behind is None:
            continue
        is_whole = taken.shape[1] == behind.shape[1]  # else every rank has all of it, and its own heads behind it
        is_right = heads == [0] if is_whole else len(heads) <= 1
        told = None if is_right else f"an edit of head 0 changed heads {heads}"
        found = Measured(outcome=Outcome.HOLDS if is_right else Outcome.FAILS, told=told)
        yield _check(values, name, f"an edit of one head changes that head of {name}_rot alone", found)


# sums over heads and neurons


def _summed(values: LayerValues, model: nn.Module, parameters: NamedParameters, links: Links) -> list[Check]:
    parts = values.parts
    if parts is None:
        return []
    checks = []
    for name, matrix, bias, module in (
        ("head_out", None, "b_O", parts.out),
        ("mlp_post", "W_out", "b_out", parts.down),
    ):
        value, given = values.values.get(name), values.output(module)
        if name not in values.names or value is None or module is None:
            continue
        owner = (parts.attention if name == "head_out" else parts.mlp) or ""
        path = join(values.path, owner) if owner else values.path
        projection: Any = model.get_submodule(join(values.path, module))
        added = parameters[own].to(value.device).float() if (own := join(path, bias)) in set(parameters) else None
        plus = f" + {bias}" if added is not None else ""
        if matrix is None:
            total, sizes = value.float().sum(1), value.float().abs().sum(1)
            says = f"head_out, summed over heads{plus} = {module}.output"
        else:
            weight = parameters[join(path, matrix)].to(value.device)
            taken = projection.own_input(value) if hasattr(projection, "own_input") else value
            total = (taken @ weight).float()
            sizes = total.abs()
            says = f"mlp_post @ W_out{plus} = {module}.output"
        if hasattr(projection, "adds_changes"):  # ranks have parts of the sum
            total, sizes = links.ordered_sum(torch.stack([total, sizes])).unbind(0)
        if added is not None:
            total, sizes = total + added, sizes + added.abs()
        found = None if given is None else sum_of_parts(_as(given, total), total, sizes)
        checks.append(_check(values, name, says, found))
    return checks


# the residual


def _residual(values: LayerValues, call: Call) -> Iterator[Check]:
    parts = values.parts
    pre, mid, post = (values.values.get(name) for name in ("input:", "resid_mid", "output:"))
    if parts is None or pre is None or post is None:
        told = "no tiny twin of this family could be run, which tells what is added"
        yield _check(values, "resid_pre resid_post", "the residual adds up", _told(told))
        return
    by_attention, by_mlp = (
        values.output(added.module if added else None) for added in (parts.attention_adds, parts.mlp_adds)
    )
    if "resid_mid" in values.names and mid is not None:
        first = _step(
            values, "resid_mid = resid_pre", mid, pre, parts.attention_adds, by_attention, "resid_mid head_out"
        )
        yield first
        second = _step(values, "resid_post = resid_mid", post, mid, parts.mlp_adds, by_mlp, "resid_mid resid_post")
        # who is between is told by what attention adds: where that holds, the other's failure is not its fault
        yield replace(second, blames=() if first.outcome is Outcome.HOLDS else second.blames)
        sums = first.outcome, second.outcome
    elif parts.attention_adds is not None and parts.mlp_adds is not None:
        words = f"{_words(parts.attention_adds)} + {_words(parts.mlp_adds)}"
        found = None
        if by_attention is not None and by_mlp is not None:
            given = (by_attention, parts.attention_adds.scale), (by_mlp, parts.mlp_adds.scale)
            found = sum_of(post, pre, *((_as(own, post), scale) for own, scale in given))
        side_by_side = ", side by side" if parts.mid is None else ""
        says = f"resid_post = resid_pre + {words}{side_by_side}"
        yield _check(values, "resid_post resid_pre head_out", says, found, "head_out")
        sums = (found.outcome if found else Outcome.UNCHECKED,) * 2
    else:
        yield _check(values, "resid_pre resid_post", "the residual adds up", _told(parts.why_no_mid))
        sums = Outcome.UNCHECKED, Outcome.UNCHECKED
    yield from _given(values, "attention_output", parts.attention_adds, sums[0], call)
    yield from _given(values, "mlp_output", parts.mlp_adds, sums[1], call)
    yield from _with_residual(values, parts.attention_adds, mid, "resid_mid")
    yield from _with_residual(values, parts.mlp_adds, post, "resid_post")


def _step(
    values: LayerValues, says: str, total: Tensor, base: Tensor, added: Added | None, own: Tensor | None, names: str
) -> Check:
    """One of two things that are added one after the other."""
    if added is None:
        return _check(values, names, f"{says} + ...", _told("no module of this layer gives what is added"))
    if own is None:
        return _check(values, names, f"{says} + {_words(added)}", None)
    own = _as(own, total)
    found = sum_of(total, base, (own, added.scale))
    words = f"{says} + {_words(added)}"
    if found.outcome is Outcome.FAILS:
        served = replace(added, scale=factor_of(total, base, own))  # it may be another one in every layer
        together = base.float() + added.scale * own.float()
        factor = factor_of(total, torch.zeros_like(total), together)
        if sum_of(total, base, (own, served.scale)).outcome is Outcome.HOLDS:
            found, words = Measured(outcome=Outcome.HOLDS), f"{says} + {_words(served)}"
        elif abs(factor - 1) > _PLAIN and equal(total, factor * together).outcome is Outcome.HOLDS:
            name, _, sides = says.partition(" = ")
            found, words = Measured(outcome=Outcome.HOLDS), f"{name} = {factor:.4g} x ({sides} + {_words(added)})"
    return _check(values, names, words, found, names.replace("resid_post", ""))


def _given(values: LayerValues, name: str, added: Added | None, summed: Outcome, call: Call) -> Iterator[Check]:
    """Whether the name of what a block gives is what is added, but for a norm or a factor behind it."""
    value = values.values.get(name)
    if name not in values.names or value is None:
        return
    says = f"{name} is what is added to the residual"
    given = values.output(None if added is None else added.module)
    if added is None or given is None or summed is not Outcome.HOLDS:
        outcome = Outcome.FAILS if summed is Outcome.FAILS else Outcome.UNCHECKED
        found = Measured(outcome=outcome, told="what is added was not borne out by the served weights")
    elif added.is_normed:
        says = f"{name} is what is added to the residual, behind {added.module}"
        found = equal(_as(given, value), call(join(values.path, added.module), value[None])[0])
    else:
        times = f", {added.scale:.4g} times" if added.is_scaled else ""
        says, found = f"{says}{times}", equal(value, _as(given, value))
    # where an MLP gives but a part of what is added, it takes but a part of what is given
    yield _check(values, name, says, found, "mlp_output mlp_input" if name == "mlp_output" else None)


def _with_residual(values: LayerValues, added: Added | None, total: Tensor | None, name: str) -> Iterator[Check]:
    """Modules around what is added that give the residual with it."""
    way = [] if added is None else added.module.split(".")
    for depth in range(1, len(way)):
        around = ".".join(way[:depth])
        given = values.output(around)
        if given is None or total is None or given.numel() != total.numel():
            continue
        if equal(_as(given, total), total).outcome is Outcome.HOLDS:
            says = f"{around}.output is {name}: it includes the residual"
            yield _check(values, name, says, Measured(outcome=Outcome.HOLDS))


def _as(given: Tensor, other: Tensor) -> Tensor:
    """Rows in the shape of others where they are as many numbers: heads side by side, say."""
    return given.reshape(other.shape) if given.numel() == other.numel() else given


def _words(added: Added) -> str:
    factor = f"{added.scale:.4g} x " if added.is_scaled else ""
    normed = " (a norm of what came before)" if added.is_normed else ""
    return f"{factor}{added.module}.output{normed}"


def _told(reason: str) -> Measured:
    return Measured(outcome=Outcome.UNCHECKED, told=reason)
