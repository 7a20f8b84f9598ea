"""The logit lens: what each layer would say next if it were the last one; and which directions it reads as a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace import functions
from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.methods.imports import needs
from polytrace.methods.labels import labelled
from polytrace.methods.places import Of, Prompts, check_top_k, layers_of, point_of, positions_of, prompts_of, token_ids
from polytrace.methods.unembedding import final_norm, prepare_unembedding, unembed
from polytrace.tokenizer import token_texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from xarray import DataArray

    from polytrace.certificate import Receipt
    from polytrace.model import Model

_LOGIT_BYTES = 64 << 20  # of the layers that are unembedded in one call, about

Translate = Callable[[Any, int], Any]  # a residual and its layer's number -> the residual that is unembedded


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What a lens read. Arrays over prompt x layer x position x rank, or x token where tokens were asked for.

    `position` counts from the prompt's beginning, or from its end where prompts differ in length (a place that a prompt
    does not have: NaN, -1 or ""); the tokens that stand there are the coordinate `position_token`.
    """

    probability: DataArray
    logit: DataArray
    token: DataArray | None  # texts, most likely first; None where tokens were asked for
    token_id: DataArray | None
    rank: DataArray | None  # of the tokens that were asked for: 0 is the most likely one of the vocabulary
    receipt: Receipt

    def table(self, prompt: int = 0) -> DataFrame:
        """One prompt's readings as people look at them: layers down, positions across, `token 93%` in each cell."""
        pandas = needs("pandas")
        share = self.probability.isel(prompt=prompt)
        places = zip(share.position.values.tolist(), share.position_token.values.tolist(), strict=True)
        names = [f"{place}:{text}" for place, text in places]
        texts = None if self.token is None else self.token.isel(prompt=prompt, rank=0).values.tolist()
        rows: list[list[str]] = []
        for number, chances in enumerate(share.values.tolist()):
            if texts is not None:
                first = zip(texts[number], chances, strict=True)
                rows.append([f"{text} {chance[0]:.0%}" if text else "" for text, chance in first])
            else:
                asked = share.token.values.tolist()
                rows.append([" ".join(f"{t!r} {c:.0%}" for t, c in zip(asked, own, strict=True)) for own in chances])
        return pandas.DataFrame(rows, index=pandas.Index(share.layer.values, name="layer"), columns=names)

    def to_dataframe(self) -> DataFrame:
        """Everything as one long table, a row a prompt, layer, position and rank or token."""
        from xarray import Dataset

        arrays = {"probability": self.probability, "logit": self.logit}
        arrays |= {"token_text": self.token, "token_id": self.token_id} if self.token is not None else {}  # type: ignore[dict-item]
        arrays |= {"rank": self.rank} if self.rank is not None else {}
        return Dataset(arrays).to_dataframe().reset_index()

    def plot(self, prompt: int = 0, **options: Any) -> Figure:
        """The first guess's probability (or the first token's) of one prompt as a heat map; options as `heat_map`."""
        from polytrace.methods.plots import heat_map

        last = "token" if self.token is None else "rank"
        return heat_map(self.probability.isel({"prompt": prompt, last: 0}), **options)


def logit_lens(
    model: Model,
    prompts: Any,
    layers: Any = None,
    positions: Any = -1,
    *,
    top_k: int = 5,
    tokens: Any = None,
    of: Of = "resid_post",
    negated: bool = False,
) -> Reading:
    """Unembeds the residual of each layer with the model's own final norm and head (nostalgebraist, 2020).

    `layers`, `positions`: which, by default all layers at each prompt's last token; None is all. Of each the `top_k`
    most likely next tokens come back, or, of chosen `tokens` (ids, or texts of one token), logit, probability and rank
    in the whole vocabulary. `of`: the point that is read, `resid_pre`, `resid_mid`, `resid_post`, or a function of the
    layer (`lambda layer: layer.mlp.output`: what the MLP says by itself, through the same norm). Logits are those of
    the model's forward, caps and scales included, so that the last layer's are its own; probabilities are over the
    whole vocabulary. `negated`: what minus the normed residual would say, the tokens that a layer speaks against
    (nnterp's `return_inv_logits`). One request; only what is named here leaves the service.
    """
    return read_lens(model, prompts, layers, positions, top_k=top_k, tokens=tokens, of=of, negated=negated)


def read_lens(
    model: Model,
    prompts: Any,
    layers: Any,
    positions: Any,
    *,
    top_k: int,
    tokens: Any,
    of: Of,
    translate: Translate | None = None,
    negated: bool = False,
) -> Reading:
    """A lens whose residuals are translated before they are unembedded."""
    batch = prompts_of(model, prompts)
    numbers = layers_of(model, layers)
    places, is_whole = positions_of(batch, positions)
    ids = None if tokens is None else token_ids(model, tokens)
    vocabulary = model.description.vocab_size
    top_k = check_top_k(model, top_k) if ids is None else 0
    prepare_unembedding(model)
    saved: list[Any] = []
    with model.trace() as tracer:
        for sequence in batch.sequences:  # each an invoke of its own: the bits that it has alone
            with tracer.invoke([list(sequence)]):
                residuals = []
                for number in numbers:
                    hidden = point_of(model.layers[number], of)
                    hidden = hidden if is_whole else hidden.at(places)
                    residuals.append(translate(hidden, number) if translate else hidden)
                step = max(1, _LOGIT_BYTES // (4 * vocabulary * (len(sequence) if is_whole else len(places))))
                read = []
                for first in range(0, len(numbers), step):
                    logits = unembed(model, functions.stack(residuals[first : first + step], 1), negated=negated)
                    read.append(_kept(logits, top_k, ids))
                saved.append([functions.cat(list(part), 1).save() for part in zip(*read, strict=True)])
    parts = [_joined(part) for part in zip(*saved, strict=True)]
    return _reading(model, batch, numbers, places, ids, parts, tracer.receipt)


def _kept(logits: Any, top_k: int, ids: list[int] | None) -> tuple[Any, Any, Any]:
    """What is left of `[1, layers, positions, vocabulary]`: logits, what they are tokens or ranks of, the partition."""
    partition = logits.float().logsumexp(-1)
    if ids is None:
        values, tokens = logits.topk(top_k)
        return values.float(), tokens.int(), partition
    ranks = [(logits > logits[..., token : token + 1]).sum(-1).int() for token in ids]
    return logits[..., ids].float(), functions.stack(ranks, -1), partition


def _joined(parts: Sequence[Any]) -> Any:
    """Prompts put together, `[prompts, layers, positions, ...]`; what a shorter one does not have is NaN or -1."""
    import numpy as np

    arrays = [np.asarray(part) for part in parts]
    widest = max(array.shape[2] for array in arrays)
    nothing = np.nan if arrays[0].dtype.kind == "f" else -1
    rows = []
    for array in arrays:
        before = [(0, 0), (0, 0), (widest - array.shape[2], 0), *[(0, 0)] * (array.ndim - 3)]
        rows.append(np.pad(array, before, constant_values=nothing))
    return np.concatenate(rows)


def _reading(
    model: Model,
    batch: Prompts,
    layers: list[int],
    places: list[int],
    ids: list[int] | None,
    parts: Sequence[Any],
    receipt: Receipt,
) -> Reading:
    import numpy as np

    logits, others, partition = parts
    dims: dict[str, Any] = {"prompt": None, "layer": layers, "position": places}
    dims["rank" if ids is None else "token"] = None if ids is None else list(token_texts(model.tokenizer, ids))
    around = [[own[place] if -len(own) <= place < len(own) else "" for place in places] for own in batch.texts]
    coords: dict[str, Any] = {"position_token": (("prompt", "position"), around)}
    if ids is not None:
        coords["token_id"] = ("token", ids)

    def array(values: Any, name: str) -> DataArray:
        return labelled(values, dims, name=name, prompts=batch.labels).assign_coords(coords)

    texts = None
    if ids is None:
        known = {token: token_texts(model.tokenizer, [token])[0] for token in np.unique(others).tolist() if token >= 0}
        texts = np.array([known.get(token, "") for token in others.ravel().tolist()], dtype=object)
    return Reading(
        probability=array(np.exp(logits - partition[..., None]), "probability"),
        logit=array(logits, "logit"),
        token=None if texts is None else array(texts.reshape(others.shape), "token"),
        token_id=array(others, "token_id") if ids is None else None,
        rank=array(others, "rank") if ids is not None else None,
        receipt=receipt,
    )


def token_directions(model: Model, tokens: Any, *, method: str = "row") -> Any:
    """The inverse of the logit lens: the directions of the residual that it reads as tokens, `[tokens, features]`.

    With `W` the unembedding, `g` the final norm's gain and `C` its centring (of a LayerNorm; else nothing), the lens
    of a residual `h` is `scale(h) * W (g * C h)` and what does not depend on `h`. So, with `w` a token's row of `W`:

    - `method="row"`: `C (g * w)`, the gradient of the token's logit at a fixed scale, not normalised. `h @ direction`
      is the token's logit up to `scale(h)` and a constant: what direct logit attribution projects on. Of all residuals
      of one length, its own has the largest logit of this token; other tokens' rows may lie along it too.
    - `method="pseudo_inverse"`: the smallest `d` for which the logits `W (g * C d)`, less their mean over all tokens,
      are closest (least squares) to 1 for the token and to 0 for all others: it says this token and as little else as
      possible. In the words of Park, Choe and Veitch (2023, arXiv:2311.03658) the row is the unembedding vector and
      this one its embedding vector under the causal inner product, the inverse covariance of the unembeddings.

    Float32 tensors, on the client. Needs torch. One request, and few for the norm; the vocabulary stays on the service.
    Logits behind the head (caps, scales) do not turn directions. For the residual whose lens is a given distribution
    see Belrose et al. (2023, arXiv:2303.08112), who optimise it.
    """
    import torch

    if method not in ("row", "pseudo_inverse"):
        raise GraphError(f"method is 'row' or 'pseudo_inverse', not {method!r}", where=user_line())
    ids = token_ids(model, tokens)
    prepare_unembedding(model)
    norm = final_norm(model)
    size = len(norm.gain)
    with model.base.trace([[0]]):
        rows = model.W_U[:, ids].T.float()
        if method == "pseudo_inverse":
            products, total, count = _moments(model)
            mean = total / count
            covariance = products - torch.outer(mean, mean) * count
            rows = rows.double() - mean
        found = rows * norm.gain
        if norm.is_centred:
            found = found - found.mean(-1, keepdim=True)
        if method == "pseudo_inverse":
            centring = torch.eye(size, dtype=torch.float64) - (1 / size if norm.is_centred else 0.0)
            folded = centring * norm.gain.double()  # C diag(g)
            found = found @ torch.linalg.pinv(folded @ covariance @ folded.T, rtol=1e-7, hermitian=True)
        return found.float().save()


_CHUNK_BYTES = 256 << 20


def _moments(model: Model) -> tuple[Any, Any, int]:
    """Inside a trace: sums over the vocabulary of products of features and of features, float64, and its size."""
    size, count = model.W_U.shape
    step = max(1, _CHUNK_BYTES // (4 * size))
    products = total = None
    for first in range(0, count, step):
        part = model.W_U[:, first : first + step].float()
        one, row = (part @ part.T).double(), part.double().sum(-1)
        products, total = (one, row) if products is None else (products + one, total + row)
    return products, total, count
