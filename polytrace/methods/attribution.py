"""Direct attribution: what each part of the model adds to the final residual, and so to a logit.

The residual stream is a sum, and with the final norm's scale taken from the run the logits are linear in it (Elhage et
al., A Mathematical Framework for Transformer Circuits, 2021). Numbers are of what the model's own `lm_head` gives: caps
and scales behind it (Gemma 2's soft-capping) are not linear and are not looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.frozen import norm_form
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.places import Token, prompts_of, token_of_each
from polytrace.methods.terms import LayerTerms, heads_of, layer_terms, neurons_of
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model

_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # of the largest feature or logit; of halves below
_OF_HALVES = 5e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Decomposition:
    """`parts` add up to `residual`, `[prompt, feature]` of the last layer at the position."""

    parts: DataArray  # [prompt, component, feature]; or `direction` for `feature`
    residual: DataArray  # [prompt, feature]; or `direction`
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """`parts` and `rest` add up to `logit`, for each prompt."""

    parts: DataArray  # [prompt, layer, part], [prompt, layer, head] or [prompt, layer, neuron]
    rest: DataArray  # [prompt, term]: what is not among the parts, the constants among it
    logit: DataArray  # [prompt]: the token's, or the difference of two, as the model's own head gives it
    receipt: Receipt


def decompose_residual(
    model: Model, prompts: Any, *, by: str = "layer", position: int = -1, onto: Any = None
) -> Decomposition:
    """The final residual at a position of each prompt as a sum of the embedding and what each layer adds.

    `by="layer"`: components "embedding", "0.attention", "0.mlp", ...; `by="head"`: "0.head.0", ... and
    "0.attention.bias" in place of attention's. What a norm behind attention makes of its heads is linear with the scale
    of the run. The embedding is the residual before layer 0, positions and all. `onto`: directions `[directions,
    hidden]`; then only dot products with these come back. Raises GraphError where the parts do not add up to 1e-4 (half
    precision: 5e-2) of the largest feature.
    """
    torch = needs_torch("decompose_residual")
    _check_choice("by", by, ("layer", "head"))
    batch, names, parts_nD = prompts_of(model, prompts), ["embedding"], []
    with model.trace(batch.ids) as tracer:
        directions = None if onto is None else _directions(onto, model).T
        shown: Callable[[Any], Any] = lambda rows: rows if directions is None else rows @ directions  # noqa: E731
        terms = [layer_terms(layer, position) for layer in model.layers]
        parts_nD.append(shown(terms[0].embedding_nD))
        _chain(terms)
        for number, own in enumerate(terms):
            if by == "layer":
                parts_nD.append(shown(own.attention_nD))
                names.append(f"{number}.attention")
            else:
                out_nHD, way, constant = heads_of(own)
                heads = shown(way.push(out_nHD)).unbind(1)
                parts_nD += [*heads, shown(torch.zeros_like(own.attention_nD) + constant)]
                names += [*(f"{number}.head.{head}" for head in range(len(heads))), f"{number}.attention.bias"]
            parts_nD.append(shown(own.mlp_nD))
            names.append(f"{number}.mlp")
        found, whole = torch.stack(parts_nD, 1).save(), shown(terms[-1].residual_nD).save()
        errors = _saved_errors(terms)
    _check(model, errors)
    off = (found.sum(1) - whole).abs().max() / found.abs().sum(1).max().clamp_min(1e-30)
    _check(model, (["the sum at the end"], off[None]))
    last = "feature" if onto is None else "direction"
    return Decomposition(
        parts=labelled(found, {"prompt": None, "component": names, last: None}, name="residual", prompts=batch.labels),
        residual=labelled(whole, {"prompt": None, last: None}, name="residual", prompts=batch.labels),
        receipt=tracer.receipt,
    )


def logit_attribution(
    model: Model,
    prompts: Any,
    tokens: Token | Sequence[Token] | tuple[Any, Any],
    *,
    by: str = "layer",
    position: int = -1,
    top_k: int | None = None,
) -> Attribution:
    """What each part adds to a token's logit (direct logit attribution), with the final norm's scale as in the run.

    `tokens`: a token (id or text), a list with one for each prompt, or a tuple `(a, b)` of these for the logit of a
    less that of b. `by="layer"`: parts "attention" and "mlp" of each layer; "head": each head; "neuron": each neuron,
    or the `top_k` of each layer that add or take most, with their numbers as the coordinate "neuron". `rest` has the
    other terms: the embedding, what biases of attention and MLP add, and "bias", which is what no part makes (the final
    norm's bias, the head's). Only these numbers come back, and, in a small request of its own before, each prompt's
    direction `[hidden]`, which every stage is to have. Raises GraphError where they do not add up to the model's own
    logit to 1e-4 of it (half precision: 5e-2).
    """
    torch = needs_torch("logit_attribution")
    _check_choice("by", by, ("layer", "head", "neuron"))
    if top_k is not None and (by != "neuron" or not isinstance(top_k, int) or top_k < 1):
        raise GraphError(
            f"top_k is a number of neurons with by='neuron', not {top_k!r} with by={by!r}", where=user_line()
        )
    if "ln_final" not in model.description.standard:
        told = (
            "this model has no final norm before its head that could be frozen: decompose_residual(onto=...) needs none"
        )
        raise GraphError(told, where=user_line())
    batch = prompts_of(model, prompts)
    wanted, other = _pair(model, tokens, len(batch))
    # 1) the direction in the residual that the tokens are, at scale 1: no site is read, so no row of a prompt runs
    with model.trace(batch.ids):
        unembedding_nD, offset = _unembedding(model, wanted, other)
        form = norm_form(model.ln_final)
        direction_nD = form.pull(unembedding_nD).save()
        constant_n = (_dot(form.bias_D, unembedding_nD) + offset).save()
    # 2) what each part has along it, where the part is; the scale is known behind the last layer
    with model.trace(batch.ids) as tracer:
        terms = [layer_terms(layer, position) for layer in model.layers]
        _chain(terms)
        parts, rest, numbers = _dots(terms, direction_nD, by, top_k)
        given, got = terms[-1].residual_nD, terms[-1].at(model.ln_final.output)
        scale_n1, terms[-1].errors["the final norm as a linear map"] = norm_form(model.ln_final).scale(given, got)
        parts, rest = parts * scale_n1[:, None], {term: value * scale_n1[:, 0] for term, value in rest.items()}
        rest["bias"] = constant_n
        sums = torch.stack(list(rest.values()), 1)
        logit, size = _logit(terms[-1].at(model.lm_head.output), wanted, other)
        added = parts.sum((1, 2)) + sums.sum(1)
        terms[-1].errors["the logit"] = ((added - logit).abs() / size.clamp_min(1.0)).amax()
        errors = _saved_errors(terms)
        parts, sums, logit = parts.save(), sums.save(), logit.save()
        numbers = None if numbers is None else numbers.save()
    _check(model, errors)
    # 3) labels
    dims: dict[str, Any] = {"prompt": None, "layer": range(model.description.num_layers)}
    dims |= {"part": ["attention", "mlp"]} if by == "layer" else {by if top_k is None else "rank": None}
    array = labelled(parts, dims, name="logit", prompts=batch.labels)
    if numbers is not None:
        array = array.assign_coords(neuron=(("prompt", "layer", "rank"), numbers.numpy()))
    texts = [token_texts(model.tokenizer, ids) for ids in (wanted, other) if ids is not None]
    differences = [" - ".join(pair) for pair in zip(*texts, strict=True)]
    return Attribution(
        parts=array,
        rest=labelled(sums, {"prompt": None, "term": list(rest)}, name="logit", prompts=batch.labels),
        logit=labelled(logit, {"prompt": None}, name="logit", tokens={"prompt": differences}, prompts=batch.labels),
        receipt=tracer.receipt,
    )


# --- inside of the trace


def _chain(terms: Sequence[LayerTerms]) -> None:
    """Each layer begins with what the one before has left."""
    for before, after in itertools.pairwise(terms):
        after.check("the residual before", after.embedding_nD, before.residual_nD)


def _saved_errors(terms: Sequence[LayerTerms]) -> tuple[list[str], Any]:
    torch = needs_torch("a decomposition")
    found = {what: error for own in terms for what, error in own.errors.items()}
    return list(found), torch.stack(list(found.values())).save()


def _check(model: Model, errors: tuple[list[str], Any]) -> None:
    names, values = errors
    limit = _TOLERANCE.get(model.description.dtype, _OF_HALVES)
    worst = int(values.nan_to_num(nan=float("inf")).argmax())
    if not float(values[worst]) <= limit:
        raise GraphError(
            f"this model's residual is not the sum that a decomposition needs: {names[worst]} is off by "
            f"{float(values[worst]):.2g} of the largest value, and {limit:g} is allowed for {model.description.dtype}",
            where=user_line(),
        )


def _unembedding(model: Model, wanted: Sequence[int], other: Sequence[int] | None) -> tuple[Any, Any]:
    """The head's direction of each prompt's token `[n, D]`, and its bias `[n]` or 0.0."""
    direction, offset = model.W_U[:, list(wanted)].T.float(), 0.0
    has_bias = "b_U" in model._table.own_parameters.get("", ())
    if has_bias:
        offset = model.b_U[list(wanted)].float()
    if other is not None:
        direction = direction - model.W_U[:, list(other)].T.float()
        offset = offset - model.b_U[list(other)].float() if has_bias else 0.0
    return direction, offset


def _logit(logits_nV: Any, wanted: Sequence[int], other: Sequence[int] | None) -> tuple[Any, Any]:
    """Each prompt's logit or difference `[n]`, and how large what it is made of is."""
    torch = needs_torch("logit_attribution")
    rows = torch.arange(len(wanted))
    first = logits_nV[rows, torch.tensor(list(wanted))]
    if other is None:
        return first, first.abs()
    second = logits_nV[rows, torch.tensor(list(other))]
    return first - second, first.abs() + second.abs()


def _dots(
    terms: Sequence[LayerTerms], direction_nD: Any, by: str, top_k: int | None
) -> tuple[Any, dict[str, Any], Any | None]:
    """The parts `[n, layers, parts]` and the other terms `[n]` along a direction, and which neurons are kept."""
    torch = needs_torch("logit_attribution")
    rest = {"embedding": _dot(terms[0].embedding_nD, direction_nD)}
    attention = torch.stack([_dot(own.attention_nD, direction_nD) for own in terms], 1)
    mlp = torch.stack([_dot(own.mlp_nD, direction_nD) for own in terms], 1)
    if by == "layer":
        return torch.stack([attention, mlp], 2), rest, None
    if by == "head":
        parts = _stacked([_head_dots(own, direction_nD) for own in terms], "heads")
        return parts, rest | {"attention bias": attention.sum(1) - parts.sum((1, 2)), "mlp": mlp.sum(1)}, None
    dots = _stacked([_neuron_dots(own, direction_nD) for own in terms], "neurons")
    rest |= {"attention": attention.sum(1), "mlp bias": mlp.sum(1) - dots.sum((1, 2))}
    if top_k is None:
        return dots, rest, None
    numbers = dots.abs().topk(min(top_k, dots.shape[2])).indices
    kept = dots.gather(2, numbers)
    return kept, rest | {"other neurons": dots.sum((1, 2)) - kept.sum((1, 2))}, numbers


def _head_dots(terms: LayerTerms, direction_nD: Any) -> Any:
    out_nHD, way, _ = heads_of(terms)
    return (out_nHD * way.pull(direction_nD)[:, None]).sum(-1)


def _neuron_dots(terms: LayerTerms, direction_nD: Any) -> Any:
    neurons_nN, weight_ND, way, _ = neurons_of(terms)
    return neurons_nN * (weight_ND @ way.pull(direction_nD).T).T


def _stacked(values: Sequence[Any], what: str) -> Any:
    sizes = {value.shape[1] for value in values}
    if len(sizes) > 1:
        raise GraphError(f"layers of this model differ in their number of {what}: {sorted(sizes)}", where=user_line())
    return needs_torch("a decomposition").stack(list(values), 1)


def _dot(parts_nD: Any, direction_nD: Any) -> Any:
    return (parts_nD * direction_nD).sum(-1)


# --- arguments


def _pair(model: Model, tokens: Any, num_prompts: int) -> tuple[list[int], list[int] | None]:
    if isinstance(tokens, tuple):
        if len(tokens) != 2:
            told = f"a tuple is a pair (a, b) for the difference of two logits, and this one has {len(tokens)} members"
            raise GraphError(f"{told}: give a list for one token of each prompt", where=user_line())
        first, second = (token_of_each(model, one, num_prompts) for one in tokens)
        return first, second
    return token_of_each(model, tokens, num_prompts), None


def _directions(onto: Any, model: Model) -> Any:
    torch = needs_torch("decompose_residual")
    directions = torch.as_tensor(onto, dtype=torch.float32)
    if directions.ndim != 2 or directions.shape[1] != model.description.hidden_size:
        told = f"onto is [directions, {model.description.hidden_size}], not {list(directions.shape)}"
        raise GraphError(told, where=user_line())
    return directions


def _check_choice(name: str, given: Any, known: Sequence[str] | Mapping[str, Any]) -> None:
    if given not in known:
        told = " or ".join(repr(one) for one in known)
        raise GraphError(f"{name} is {told}, not {given!r}", where=user_line())
