"""A sparse autoencoder as a value: its weights, and what it makes of tensors or, in a trace, of recorded values.

The formulas are those with which SAELens runs its files (https://github.com/decoderesearch/SAELens). Knows neither
files nor prompts. Weights stay here until a trace uses them; then they go along as constants, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from polytrace.errors import GraphError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.imports import needs_torch
from polytrace.methods.saes.places import LayerPoint

if TYPE_CHECKING:
    from polytrace.model import Model

ARCHITECTURES = ("standard", "gated", "jumprelu", "topk")
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_BLOCK_BYTES = 256 << 20  # of weights that are one constant: a service takes no single value above its limit
_EPSILON = 1e-5  # SAELens's, of layer_norm


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SparseAutoencoder:
    """`decode(encode(x))` is near to `x`, and few of `encode(x)` are not 0. F features, D numbers in, E out.

    Before its activation a feature is `(n(x) - b_dec) @ W_enc + b_enc`, with `b_dec` where the files say so and `n` a
    norm where they have one. Behind it, by `architecture`:

    - "standard": its positive part (Bricken et al. 2023; Cunningham et al. 2023, arXiv:2309.08600);
    - "jumprelu": what is above its `threshold`, else 0 (Rajamanoharan et al. 2024, arXiv:2407.14435; Gemma Scope:
      Lieberum et al. 2024, arXiv:2408.05147). SAELens saves batch-top-k SAEs as this;
    - "gated": `n(x) @ (W_enc exp(r_mag)) + b_mag`, its positive part, where the above is positive (Rajamanoharan et
      al. 2024, arXiv:2404.16014);
    - "topk": the positive ones of the `k` largest (Gao et al. 2024, arXiv:2406.04093).

    The reconstruction is `features @ W_dec + b_dec`, with the norm undone. A transcoder reads at `site` and gives what
    belongs at `gives` (Dunefsky et al. 2024, arXiv:2406.11944); one with `W_skip` adds `x @ W_skip.T`.
    """

    W_enc: Any  # [D, F]
    W_dec: Any  # [F, E]
    b_enc: Any  # [F]; of a gated one the gate's
    b_dec: Any  # [E]
    architecture: str = "standard"
    threshold: Any = None  # [F], of jumprelu
    r_mag: Any = None  # [F], of gated
    b_mag: Any = None  # [F], of gated
    k: int | None = None  # of topk
    W_skip: Any = None  # [E, D]
    scaling: Any = None  # [F], of features as they are decoded, from finetuning
    apply_b_dec_to_input: bool = False
    rescale_by_decoder_norm: bool = False  # features are in units of the length of their row of W_dec
    normalize: str = "none"
    site: LayerPoint | None = None  # where it reads, and, unless it is a transcoder, what it stands in for
    is_transcoder: bool = False
    gives: LayerPoint | None = None  # what a transcoder stands in for
    config: dict[str, Any] = field(default_factory=dict)  # what its files say
    _cut: dict[Any, Any] = field(default_factory=dict, init=False)  # parts of weights: each is hashed once a trace

    def __post_init__(self) -> None:
        _check(self)

    def __repr__(self) -> str:
        place = "nowhere yet" if self.site is None else f"{self.site.point} of layer {self.site.layer}"
        return f"SparseAutoencoder({self.architecture}, {self.d_in} -> {self.num_features} features, at {place})"

    @property
    def num_features(self) -> int:
        return int(self.W_enc.shape[1])

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    def at(self, point: str, layer: int, gives: LayerPoint | None = None) -> SparseAutoencoder:
        """The same SAE at a point of a layer: for files that do not say where they belong. `gives`: a transcoder's."""
        return replace(self, site=LayerPoint(point, layer), gives=gives or self.gives)

    def __call__(self, x: Any) -> Any:
        """The reconstruction of `x`, shaped as `x`."""
        return self.forward(x)

    def forward(self, x: Any) -> Any:
        """The reconstruction of `x`, shaped as `x`; of a transcoder what belongs at `gives`, `[..., E]`."""
        return self.decode(self.encode(x), like=x)

    def encode(self, x: Any, features: Sequence[int] | int | None = None) -> Any:
        """`[..., F]`, or `[..., chosen]`, of `x` `[..., D]`, or `[..., heads, head features]` of the point `z`.

        Of chosen features only their columns of `W_enc` are used, and sent; "topk" needs all to know the largest.
        """
        numbers = None if features is None else self.numbers(features)
        if self.architecture == "topk":
            whole = _largest(_joined([self._before(x, part) for part in self._blocks()]), self.k or 1)
            return whole if numbers is None else whole[..., numbers]
        if numbers is not None:
            return self._encoded(x, self._chosen(numbers))
        return _joined([self._encoded(x, part) for part in self._blocks()])

    def strongest(self, x: Any, k: int) -> tuple[Any, Any]:
        """The `k` strongest features of each row, strongest first: activations `[..., k]` and numbers `[..., k]`.

        Of a wide SAE part after part, so that no row has all of its features in memory.
        """
        if self.architecture == "topk":
            found = self.encode(x).topk(k)
            return found.values, found.indices
        values, indices, start = [], [], 0
        for part in self._blocks():
            found = self._encoded(x, part).topk(min(k, int(part["b_enc"].shape[0])))
            values.append(found.values)
            indices.append(found.indices + start)
            start += int(part["b_enc"].shape[0])
        if len(values) == 1:
            return values[0], indices[0]
        best = _joined(values).topk(k)
        return best.values, _joined(indices).gather(-1, best.indices)

    def decode(self, features: Any, like: Any = None) -> Any:
        """The activation `[..., E]` of features `[..., F]`.

        `like`: the activation that they were encoded from. It is needed where its norm is undone and for a skip, and
        gives the shape where the point has heads. Raises GraphError where it is missing.
        """
        given = self._of_decoder(features)
        found, start = self.b_dec, 0
        for block in self._blocks():
            rows = block["W_dec"]
            found = found + given[..., start : start + int(rows.shape[0])] @ rows
            start += int(rows.shape[0])
        if like is None:
            if self.normalize != "none" or self.W_skip is not None:
                told = "undoes its input's norm" if self.W_skip is None else "adds a part of its input"
                raise GraphError(f"this SAE {told}: decode(features, like=x)", where=user_line())
            return found
        if self.normalize != "none":
            _, shift, scale = self._normalised(self._flat(like))
            found = found * scale + shift
        if self.W_skip is not None:
            found = found + self._flat(like) @ self.W_skip.T
        return self._as(found, like)

    def difference(self, change: Any, features: Sequence[int] | int, like: Any) -> Any:
        """What a change of chosen features `[..., chosen]` changes in the reconstruction, shaped as `like`.

        Only their rows of `W_dec` are used, and sent.
        """
        chosen = self._chosen(self.numbers(features))
        given = self._of_decoder(change, chosen)
        found = given @ chosen["W_dec"]
        if self.normalize != "none":
            _, _, scale = self._normalised(self._flat(like))
            found = found * scale
        return self._as(found, like)

    def numbers(self, features: Sequence[int] | int) -> list[int]:
        """Features as a list. Raises GraphError for one that is not there."""
        found = []
        for one in [features] if scalar(features) is not None else list(features):  # type: ignore[arg-type]
            number = scalar(one)
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < self.num_features:
                told = f"there is no feature {one!r}; this SAE has features 0-{self.num_features - 1}"
                raise GraphError(told, where=user_line())
            found.append(number)
        if not found or len(set(found)) != len(found):
            raise GraphError(f"features are one or several, each once, not {found}", where=user_line())
        return found

    def taken(self, model: Model) -> Any:
        """What it reads in the open trace. Raises GraphError for a model that does not fit."""
        return self._value(model, self.site, self.d_in, "hook_name")

    def given(self, model: Model) -> Any:
        """What its reconstruction stands for in the open trace, to be changed in place."""
        place, hook = (self.gives, "hook_name_out") if self.is_transcoder else (self.site, "hook_name")
        return self._value(model, place, int(self.W_dec.shape[1]), hook)

    # --- the formulas

    def _encoded(self, x: Any, part: dict[str, Any]) -> Any:
        before = self._before(x, part)
        if self.architecture == "gated":
            own = self._taken_in(x) @ (part["W_enc"] * part["r_mag"].exp()) + part["b_mag"]
            return own.relu() * (before > 0)
        if self.architecture == "jumprelu":
            return before.relu() * (before > part["threshold"])
        return before.relu()

    def _before(self, x: Any, part: dict[str, Any]) -> Any:
        found = self._taken_in(x) @ part["W_enc"] + part["b_enc"]
        return found * part["length"] if self.rescale_by_decoder_norm else found

    def _taken_in(self, x: Any) -> Any:
        rows, _, _ = self._normalised(self._flat(x))
        return rows - self.b_dec if self.apply_b_dec_to_input else rows

    def _normalised(self, x: Any) -> tuple[Any, Any, Any]:
        """The input as it is encoded; what is added and what is multiplied to undo it."""
        if self.normalize == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            centred = x - mean
            spread = centred.std(-1, keepdim=True)
            return centred / (spread + _EPSILON), mean, spread
        if self.normalize == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return x / scale, 0.0, scale
        return x, 0.0, 1.0

    def _of_decoder(self, features: Any, part: dict[str, Any] | None = None) -> Any:
        own = part or {"scaling": self.scaling, "length": self._length() if self.rescale_by_decoder_norm else None}
        found = features if own.get("scaling") is None else features * own["scaling"]
        return found if own.get("length") is None else found / own["length"]

    # --- shapes

    def _flat(self, x: Any) -> Any:
        """`[..., D]` in the dtype of the weights."""
        size = self.d_in
        if int(x.shape[-1]) != size and len(x.shape) > 1 and int(x.shape[-2]) * int(x.shape[-1]) == size:
            x = x.flatten(-2)
        if int(x.shape[-1]) != size:
            told = f"this SAE takes {size} numbers, and these are of shape {list(x.shape)}"
            raise GraphError(told, where=user_line())
        return x.to(self.W_enc.dtype)

    def _as(self, found: Any, like: Any) -> Any:
        """With heads where `like` has them."""
        if int(like.shape[-1]) == self.d_in or int(self.W_dec.shape[1]) != self.d_in:
            return found
        return found.unflatten(-1, (self.d_in // int(like.shape[-1]), int(like.shape[-1])))

    def _value(self, model: Model, place: LayerPoint | None, size: int, hook: str) -> Any:
        if place is None:
            said = self.config.get(hook)
            told = f"name the place {said!r}, which is no named point" if said else "do not say where it belongs"
            ask = "sae.at('resid_post', layer)" if hook == "hook_name" else "sae.at(..., gives=LayerPoint(...))"
            raise GraphError(f"the files of this SAE {told}: {ask}", where=user_line())
        value = place.value(model)
        found = [int(own) for own in value.shape[2:]]
        if prod(found) != size:
            told = f"this SAE is of {size} numbers at {place.point} of layer {place.layer}"
            sizes = " x ".join(map(str, found))
            raise GraphError(f"{told}, where {model.description.name} has {sizes}", where=user_line())
        return value

    # --- parts of the weights

    def _blocks(self) -> list[dict[str, Any]]:
        """The weights by features, in parts that are small enough to be constants."""
        if "blocks" not in self._cut:
            row = max(self.d_in, int(self.W_dec.shape[1])) * self.W_enc.element_size()
            step = max(1, _BLOCK_BYTES // row)
            whole = step >= self.num_features
            starts = range(0, self.num_features, step)
            self._cut["blocks"] = [self._part(None if whole else slice(one, one + step)) for one in starts]
        found: list[dict[str, Any]] = self._cut["blocks"]
        return found

    def _chosen(self, numbers: list[int]) -> dict[str, Any]:
        key = tuple(numbers)
        if key not in self._cut:
            self._cut[key] = self._part(numbers)
        found: dict[str, Any] = self._cut[key]
        return found

    def _part(self, which: Any) -> dict[str, Any]:
        vectors = {name: getattr(self, name) for name in ("b_enc", "threshold", "r_mag", "b_mag", "scaling")}
        vectors = {name: value for name, value in vectors.items() if value is not None}
        if self.rescale_by_decoder_norm:
            vectors["length"] = self._length()
        if which is None:
            return {"W_enc": self.W_enc, "W_dec": self.W_dec, **vectors}
        picked = {name: value[which] for name, value in vectors.items()}
        return {"W_enc": self.W_enc[:, which].contiguous(), "W_dec": self.W_dec[which].contiguous(), **picked}

    def _length(self) -> Any:
        if "length" not in self._cut:
            self._cut["length"] = self.W_dec.float().norm(dim=-1).to(self.W_dec.dtype)
        return self._cut["length"]


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else needs_torch("a sparse autoencoder").cat(parts, -1)


def _largest(values: Any, k: int) -> Any:
    """The positive ones of the k largest, in their places."""
    best = values.topk(k, -1)
    return needs_torch("a sparse autoencoder").zeros_like(values).scatter(-1, best.indices, best.values.relu())


def _check(sae: SparseAutoencoder) -> None:
    needs_torch("a sparse autoencoder")
    if sae.architecture not in ARCHITECTURES or sae.normalize not in NORMALISATIONS:
        told = f"architecture {sae.architecture!r} with norm {sae.normalize!r}"
        known = f"known are {', '.join(ARCHITECTURES)} with {', '.join(NORMALISATIONS)}"
        raise GraphError(f"an SAE of {told} is not one that is known; {known}", where=user_line())
    size, features = (int(own) for own in sae.W_enc.shape)
    out = int(sae.W_dec.shape[-1])
    wanted: dict[str, tuple[int, ...]] = {"W_dec": (features, out), "b_enc": (features,), "b_dec": (out,)}
    needed = {"jumprelu": ["threshold"], "gated": ["r_mag", "b_mag"]}.get(sae.architecture, [])
    wanted |= dict.fromkeys(needed, (features,))
    wanted |= {"scaling": (features,)} if sae.scaling is not None else {}
    wanted |= {"W_skip": (out, size)} if sae.W_skip is not None else {}
    for name, shape in wanted.items():
        own = getattr(sae, name)
        if own is None or tuple(own.shape) != shape:
            told = "is missing" if own is None else f"has the shape {list(own.shape)}, not {list(shape)}"
            raise GraphError(f"{name} of the SAE {told}", where=user_line())
    if sae.architecture == "topk" and not (isinstance(sae.k, int) and 1 <= sae.k <= features):
        raise GraphError(f"k of a topk SAE is 1-{features}, not {sae.k!r}", where=user_line())
    if sae.is_transcoder and (sae.apply_b_dec_to_input or sae.normalize != "none"):
        told = "a transcoder gives what belongs elsewhere: it takes no b_dec from its input, and undoes no norm"
        raise GraphError(told, where=user_line())
    if not sae.is_transcoder and out != size:
        told = f"it takes {size} numbers and gives {out}: it is no autoencoder, but a transcoder"
        raise GraphError(told, where=user_line())
