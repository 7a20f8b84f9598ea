"""The terms of the residual stream at one token of each prompt, or at all, as values of the open trace.

The final residual is the embedding plus what each layer's attention and MLP add; attention's part is what its heads and
a bias add, the MLP's what its neurons and a bias add. Every sum is also worked out as a relative error, so that a model
whose parts do not add up this way is noticed. Rows are float32: n = prompts (and their tokens, `[n, T, ...]`, where it
is about all), D = features of the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.frozen import NormForm, norm_form
from polytrace.methods.imports import needs_torch
from polytrace.modules import Module


@dataclass(slots=True, kw_only=True)
class LayerTerms:
    """What one layer adds at one position of each prompt; None: at every token."""

    layer: Module
    position: int | None
    embedding_nD: Any  # the residual before it
    attention_nD: Any
    mlp_nD: Any
    residual_nD: Any  # behind it
    errors: dict[str, Any] = field(default_factory=dict)  # by what did not add up

    def at(self, value: Any) -> Any:
        """The rows of a value, float32."""
        return _rows(value, self.position)

    def weight(self, name: str) -> Any:
        """A named weight of the layer, None where the family has none."""
        table, path = self.layer._table, self.layer._path
        is_there = name in table.layer_weights.get(path, {}) or name in table.own_parameters.get(path, ())
        return getattr(self.layer, name).float() if is_there else None

    def check(self, what: str, got: Any, wanted: Any) -> None:
        """Notes by how much two values differ, relative to the residual's largest feature."""
        largest = self.residual_nD.abs().amax().clamp_min(1e-30)
        self.errors[f"{what} of {self.layer._path}"] = (got - wanted).abs().amax() / largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From what a sublayer's last matrix gives to what is added to the residual: a frozen norm, a factor."""

    norm: NormForm | None
    scale_n1: Any  # of the norm and the factor together
    factor_n1: Any  # of what the norm gives

    def push(self, parts_nPD: Any) -> Any:
        """What parts of the matrix's result are of what is added."""
        return (parts_nPD if self.norm is None else self.norm.push(parts_nPD)) * self.scale_n1.unsqueeze(-2)

    def pull(self, direction_nD: Any) -> Any:
        """The direction in the matrix's result that one in the residual is."""
        return (direction_nD if self.norm is None else self.norm.pull(direction_nD)) * self.scale_n1

    def constant(self, bias_D: Any) -> Any:
        """What a bias of the matrix and the norm's own add, `[n, D]` (or 0.0)."""
        own = 0.0 if self.norm is None else self.norm.bias_D * self.factor_n1
        return own if bias_D is None else own + self.push(bias_D[None, None]).squeeze(-2)


def _rows(value: Any, position: int | None) -> Any:
    return value.float() if position is None else value.at(position).float()


def layer_terms(layer: Module, position: int | None) -> LayerTerms:
    """Attention's and the MLP's part, exact by construction where something lies between them, else checked."""
    before, after = (_rows(value, position) for value in (layer.resid_pre, layer.resid_post))
    if "resid_mid" in layer.points:
        middle = _rows(layer.resid_mid, position)
        attention, mlp = middle - before, after - middle
        return LayerTerms(
            layer=layer, position=position, embedding_nD=before, attention_nD=attention, mlp_nD=mlp, residual_nD=after
        )
    attention, mlp = (_rows(value, position) for value in (layer.attention_added, layer.mlp_added))  # side by side
    terms = LayerTerms(
        layer=layer, position=position, embedding_nD=before, attention_nD=attention, mlp_nD=mlp, residual_nD=after
    )
    terms.check("attention and MLP side by side", before + attention + mlp, after)
    return terms


def norm_behind(layer: Module, half: str) -> Module | None:
    """The norm between what "attention" or "mlp" gives and what is added of that, None where there is none."""
    known = layer._table.points.get(layer._path, {})
    names = f"{half}_output", f"{half}_added"
    given, added = (known[name].site if name in known else None for name in names)
    if given is None or added is None or given.module == added.module:
        return None
    return Module(layer._model, added.module)


def heads_of(terms: LayerTerms) -> tuple[Any, Way, Any]:
    """`head_out` at the position `[n, heads, D]`, its way into the residual, and what biases add `[n, D]` or 0.0."""
    out_nHD = terms.at(terms.layer.head_out)
    bias = terms.weight("b_O")
    whole = out_nHD.sum(-2) if bias is None else out_nHD.sum(-2) + bias
    way = _way(terms, norm_behind(terms.layer, "attention"), whole, terms.attention_nD)
    constant = way.constant(bias)
    terms.check("the heads", way.push(out_nHD).sum(-2) + constant, terms.attention_nD)
    return out_nHD, way, constant


def neurons_of(terms: LayerTerms) -> tuple[Any, Any, Way, Any]:
    """`mlp_post` at the position `[n, neurons]`, `W_out`, the way into the residual, and what biases add."""
    neurons_nN, weight_ND, bias = terms.at(terms.layer.mlp_post), terms.weight("W_out"), terms.weight("b_out")
    if weight_ND is None:
        raise GraphError(f"{terms.layer._path} has no W_out to say what a neuron adds", where=user_line())
    whole = neurons_nN @ weight_ND if bias is None else neurons_nN @ weight_ND + bias
    way = _way(terms, norm_behind(terms.layer, "mlp"), whole, terms.mlp_nD)
    constant = way.constant(bias)
    pushed = way.push(whole[:, None])[:, 0] + (0.0 if way.norm is None else way.norm.bias_D * way.factor_n1)
    terms.check("the neurons", pushed, terms.mlp_nD)
    return neurons_nN, weight_ND, way, constant


def _way(terms: LayerTerms, norm: Module | None, whole_nD: Any, added_nD: Any) -> Way:
    torch = needs_torch("a decomposition")
    form, given, scale = None, whole_nD, 1.0
    if norm is not None:
        taken, given = terms.at(norm.input), terms.at(norm.output)
        form = norm_form(norm)
        scale, terms.errors[f"{norm._path} as a linear map"] = form.scale(taken, given)
        terms.check(f"what {norm._path} takes", whole_nD, taken)
    factor = (added_nD * given).sum(-1, keepdim=True) / (given * given).sum(-1, keepdim=True).clamp_min(1e-30)
    factor = torch.where((factor - 1.0).abs() < 1e-3, torch.ones_like(factor), factor)  # most families add it as it is
    return Way(norm=form, scale_n1=factor * scale, factor_n1=factor)
