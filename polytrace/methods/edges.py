"""Edge attribution patching: how much of the metric goes from each part of the model straight to each other one.

Syed et al., "Attribution Patching Outperforms Automated Circuit Discovery" (2023, arXiv:2310.10348). The residual is a
sum of what writers add: the embedding, heads, MLPs. Readers take it: queries, keys and values of each head, MLPs, the
final norm before the logits. An edge is worth the writer's difference between two runs times the metric's gradient at
what its reader alone takes: to first order what `patch_paths` finds when this one edge is patched. Two forwards and one
backward give all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.cells import places_in
from polytrace.methods.imports import needs_torch
from polytrace.methods.metrics import Metric, Run, as_metric, logits_for, measure
from polytrace.methods.patching import check_lengths, pairs_of
from polytrace.methods.places import Prompts, value_of
from polytrace.methods.sweeps import Scale, Sweep, numbers_of, sweep_of
from polytrace.methods.terms import heads_of, layer_terms, norm_behind
from polytrace.methods.transformer_lens.blocks import Block, find_blocks
from polytrace.modules import Module

if TYPE_CHECKING:
    from polytrace.model import Model

_WEIGHTS = {"q": "W_Q", "k": "W_K", "v": "W_V"}
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4}  # of the residual's largest feature; of halves below
_OF_HALVES = 5e-2

# n = prompts, T = tokens of the view, W = writers, R = readers, H = heads, C = features of a head, D = of the residual


def edge_attribution_patching(
    model: Model,
    clean: Any,
    corrupt: Any,
    metric: Metric | Callable[[Any], Any],
    *,
    positions: Any = None,
) -> Sweep:
    """What each edge would change of the clean run's metric if it carried what it carries in the corrupt one.

    `effect` [writer, reader]: writers "embedding", "3.0" (a head), "3.mlp"; readers "3.0.q", "3.0.k", "3.0.v" (k and v
    of key/value heads), "3.mlp", "logits"; NaN where a reader does not stand behind a writer. `positions`: the tokens
    whose edges count, all at once; None is every token. Pairs of prompts have equal lengths. It is the estimated change
    of the metric, so that the edges of a writer add up to what `attribution_patching` says of it (not normalised, less
    the clean metric). Behind a norm (Gemma 2, OLMo 2) a head writes what the norm, with its scale in either run, makes
    of what it gives, and its edges add up to the gradient of that. Needs torch.

    Raises GraphError where the residual is not the sum of what is written, or its gradient not that of its readers,
    to 1e-4 of the largest feature.
    """
    torch = needs_torch("edge_attribution_patching")
    base, other = pairs_of(model, clean, corrupt)
    check_lengths(base, other)
    measured, blocks = as_metric(metric), find_blocks(model)
    chosen_nT = torch.tensor(_columns(base, places_in(model, base, positions)))
    with model.trace() as tracer:
        with tracer.invoke(base.ids):
            reference = logits_for(measured, model)
            best = measure(measured, Run(model, base))
            kept, taken, last = _written(model), _read(model), model.layers[-1].resid_post
            mask_nT = tracer.mask.float()
            chosen_nT = chosen_nT * mask_nT
        with tracer.invoke(other.ids):
            least = measure(measured, Run(model, other, reference.detach())).save()
            sent = _written(model)
        deltas = [(there - here) * chosen_nT[:, :, None, None] for here, there in zip(kept, sent, strict=True)]
        whole = ((sent[-1] - kept[-1]) * chosen_nT[:, :, None, None])[:, :, 0]
        with best.sum().backward():
            graph = _Edges(model, blocks, torch, mask_nT)
            graph.record(deltas[:-1], taken, last)
        errors = torch.stack([*graph.errors, _apart(graph.written.sum(2), whole, mask_nT)]).save()
        best = best.save()
    _check(model, errors)
    return sweep_of(
        numbers_of(best, base)[:, None, None] + graph.array(len(base)),
        {"writer": graph.writers, "reader": graph.readers},
        base,
        name=measured.name,
        scale=Scale.CHANGE,
        receipt=tracer.receipt,
        clean=best,
        corrupt=least,
    )


@dataclass(slots=True)
class _Taken:
    """What a layer's readers take, and where from."""

    layer: Module
    before: Any  # the residual
    middle: Any | None  # None: the MLP reads it before attention too
    attention: Any  # behind the norm, as is
    mlp: Any
    heads: dict[str, Any]  # by "q", "k", "v", `[n, T, H, C]`


def _written(model: Model) -> list[Any]:
    """`[n, T, W, D]` of the open invoke: the embedding, heads and MLP of each layer, and the residual last."""
    terms = [layer_terms(layer, None) for layer in model.layers]
    found = [terms[0].embedding_nD[:, :, None]]
    for own in terms:
        heads, way, _ = heads_of(own)
        found += [way.push(heads), own.mlp_nD[:, :, None]]
    return [*found, terms[-1].residual_nD[:, :, None]]


def _read(model: Model) -> list[_Taken]:
    return [
        _Taken(
            layer,
            layer.resid_pre,
            layer.resid_mid if "resid_mid" in layer.points else None,
            layer.attention_input,
            _given_to_mlp(layer),
            {name: value_of(model, number, name) for name in _WEIGHTS},
        )
        for number, layer in enumerate(model.layers)
    ]


def _in_front(layer: Module, norm: str | None, half: str) -> str | None:
    """A block's norm, where it stands in front of that half: some families norm behind it alone."""
    behind = norm_behind(layer, half)
    return None if behind is not None and behind._path == norm else norm


def _given_to_mlp(layer: Module) -> Any:
    """What the MLP is given, as a value of its own: side by side, attention has the same tensor and its own part of the
    gradient there; what is assigned has that of this way alone.
    """
    given = layer.mlp_input * 1.0
    layer.mlp_input = given
    return given


@dataclass(slots=True)
class _Edges:
    """Scores in the open backward."""

    model: Model
    blocks: Sequence[Block]
    torch: Any
    mask_nT: Any
    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)  # [n, W, R] of the writers before, by group of readers
    errors: list[Any] = field(default_factory=list)
    written: Any = None  # [n, T, W, D]

    def record(self, deltas: Sequence[Any], taken: Sequence[_Taken], last: Any) -> None:
        """`deltas` in the order of `_written`, and the last residual."""
        self.written = self._write(deltas[0], ["embedding"])
        behind = [own.before for own in taken[1:]] + [last]
        for number, (own, block) in enumerate(zip(taken, self.blocks, strict=True)):
            to_heads = self._read_heads(number, own, block)
            heads, mlp = deltas[1 + 2 * number : 3 + 2 * number]
            names = [f"{number}.{head}" for head in range(heads.shape[2])]
            if own.middle is None:  # side by side
                to_mlp = self._read_mlp(number, own, own.before, block)
                self.written = self._write(heads, names)
                self._check_readers(own.before, to_heads + to_mlp + behind[number].grad)
            else:
                self.written = self._write(heads, names)
                to_mlp = self._read_mlp(number, own, own.middle, block)
                self._check_readers(own.middle, to_mlp + behind[number].grad)
                self._check_readers(own.before, to_heads + own.middle.grad)
            self.written = self._write(mlp, [f"{number}.mlp"])
        self._score(last.grad[:, :, None], ["logits"])

    def _write(self, delta: Any, names: list[str]) -> Any:
        self.writers += names
        return delta if self.written is None else self.torch.cat([self.written, delta], 2)

    def _check_readers(self, residual: Any, gradient_nTD: Any) -> None:
        """Who reads the residual from one place to the next has all of its gradient together."""
        self.errors.append(_apart(gradient_nTD, residual.grad, self.mask_nT))

    def _read_heads(self, number: int, own: _Taken, block: Block) -> Any:
        parts, names = [], []
        for name, weight in _WEIGHTS.items():
            gradient_nTHC = own.heads[name].grad
            parts.append(self.torch.einsum("nthc,hdc->nthd", gradient_nTHC, getattr(own.layer, weight)))
            names += [f"{number}.{head}.{name}" for head in range(gradient_nTHC.shape[2])]
        gradient_nTRD = self.torch.cat(parts, 2)
        norm = _in_front(own.layer, block.ln1, "attention")
        gradient_nTRD = self._before_norm(norm, own.before, own.attention, gradient_nTRD)
        self._score(gradient_nTRD, names)
        return gradient_nTRD.sum(2)

    def _read_mlp(self, number: int, own: _Taken, residual: Any, block: Block) -> Any:
        norm = _in_front(own.layer, block.ln2, "mlp")
        gradient = self._before_norm(norm, residual, own.mlp, own.mlp.grad[:, :, None])
        self._score(gradient, [f"{number}.mlp"])
        return gradient[:, :, 0]

    def _before_norm(self, norm: str | None, residual: Any, given: Any, gradient_nTRD: Any) -> Any:
        """Gradients at what a norm gives as those at what it takes, for each reader on its own."""
        if norm is None:
            self.errors.append(_apart(residual, given, self.mask_nT))
            return gradient_nTRD
        rows = residual.detach()[:, :, None].expand(gradient_nTRD.shape).contiguous()
        normed = Module(self.model, norm)(rows)
        self.errors.append(_apart(normed[:, :, 0], given, self.mask_nT))
        (found,) = self.torch.autograd.grad(normed, [rows], grad_outputs=gradient_nTRD)
        return found

    def _score(self, gradient_nTRD: Any, names: list[str]) -> None:
        self.readers += names
        self.scores.append(self.torch.einsum("ntwd,ntrd->nwr", self.written, gradient_nTRD.float()).save())

    def array(self, prompts: int) -> Any:
        """`[prompts, writers, readers]`, numpy's, behind the trace."""
        import numpy as np

        found, column = np.full((prompts, len(self.writers), len(self.readers)), np.nan), 0
        for scores in self.scores:
            part = np.array(scores.tolist(), dtype=float)
            found[:, : part.shape[1], column : column + part.shape[2]] = part
            column += part.shape[2]
        return found


def _apart(one: Any, other: Any, mask_nT: Any) -> Any:
    """By how much two values `[n, T, D]` differ, of the largest element; pads are left out."""
    one, other = (value.detach().float() * mask_nT[:, :, None] for value in (one, other))
    return (one - other).abs().amax() / other.abs().amax().clamp_min(1e-30)


def _check(model: Model, errors: Any) -> None:
    limit, worst = _TOLERANCE.get(model.description.dtype, _OF_HALVES), float(errors.nan_to_num(nan=float("inf")).max())
    if worst > limit:
        raise GraphError(
            f"this model's residual is not the sum of what its heads and MLPs give, each read through a norm of its "
            f"own, or something else reads it: values or gradients are off by {worst:.2g} of the largest, where "
            f"{limit:g} is allowed; use attribution_patching",
            where=user_line(),
        )


def _columns(batch: Prompts, places: Sequence[Sequence[int]]) -> list[list[float]]:
    """1.0 at chosen tokens of the left-padded view."""
    rows = [[0.0] * batch.longest for _ in places]
    for row, own, length in zip(rows, places, batch.lengths, strict=True):
        for place in own:
            row[batch.longest - length + place] = 1.0
    return rows
