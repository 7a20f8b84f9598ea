"""Vectors that tell two sets of prompts apart: differences of means, of two prompts, and their main direction.

Rimsky et al., Steering Llama 2 via Contrastive Activation Addition (2023, arXiv:2312.06681); Turner et al., Steering
Language Models With Activation Engineering (2023, arXiv:2308.10248); Zou et al., Representation Engineering (2023,
arXiv:2310.01405).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytrace.certificate import Receipt
from polytrace.errors import GraphError, WireError
from polytrace.lines import user_line
from polytrace.literals import scalar
from polytrace.methods.gates import Gate
from polytrace.methods.imports import needs_torch
from polytrace.methods.labels import labelled
from polytrace.methods.places import Layers, Positions, check_stream, layers_of, prompts_of, token_ids

if TYPE_CHECKING:
    from xarray import DataArray

    from polytrace.model import Model
    from polytrace.modules import Module

_ONE_REQUEST = 512  # prompts of a set that go into one request; of more, a map takes them in parts
_IN_ONE_VIEW = 32  # prompts of an invoke, which stay together when passes are cut
_MEASURES = ("distance", "accuracy", "middle")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Vectors:
    """A vector for each of some layers; `vectors[3]` is that of layer 3. `steer` takes it whole."""

    tensor: Any  # [layers, hidden], or [layers, positions, hidden]; float32
    layers: tuple[int, ...]
    positions: tuple[int, ...] | None = None  # of each prompt where they belong; None: wherever one wants
    of: str = "resid_post"
    method: str = ""
    separation: DataArray | None = None  # [layer, measure]
    receipts: tuple[Receipt, ...] = ()

    def __getitem__(self, layer: int) -> Any:
        """The vector of a layer. Raises GraphError where there is none of it."""
        if layer not in self.layers:
            told = f"there is no vector of layer {layer}, only of {', '.join(map(str, self.layers))}"
            raise GraphError(told, where=user_line())
        return self.tensor[self.layers.index(layer)]

    def unit(self) -> Vectors:
        """The same directions with length 1."""
        length = self.tensor.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return Vectors(
            tensor=self.tensor / length,
            layers=self.layers,
            positions=self.positions,
            of=self.of,
            method=self.method,
            separation=self.separation,
            receipts=self.receipts,
        )

    def gate(self, layer: int, position: int | None = None) -> Gate:
        """What is open on the positive side of the middle between the sets, by the residual along a layer's vector."""
        if self.separation is None or self.positions is not None:
            raise GraphError("a gate needs vectors of two sets, whose separation was measured", where=user_line())
        return Gate(
            direction=self.unit()[layer],
            layer=layer,
            threshold=float(self.separation.sel(layer=layer, measure="middle")),
            position=position,
            of=self.of,
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: `vectors` and, where it was measured, `separation`."""
        torch = needs_torch("saving vectors")
        from safetensors.torch import save_file

        tensors = {"vectors": self.tensor.contiguous()}
        if self.separation is not None:
            tensors["separation"] = torch.tensor(self.separation.values)
        told = {"layers": self.layers, "positions": self.positions, "of": self.of, "method": self.method}
        save_file(tensors, str(path), metadata={"polytrace_vectors": json.dumps(told)})

    @staticmethod
    def load(path: str | Path) -> Vectors:
        """What `save` wrote. Raises WireError for any other file."""
        needs_torch("loading vectors")
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                told = json.loads(file.metadata()["polytrace_vectors"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers, positions = (None if own is None else tuple(own) for own in (told["layers"], told["positions"]))
            own = Vectors(
                tensor=tensors["vectors"],
                layers=layers or (),
                positions=positions,
                of=told["of"],
                method=told["method"],
                separation=_labelled(tensors["separation"], layers or ()) if "separation" in tensors else None,
            )
        except FileNotFoundError:
            raise
        except Exception as error:
            raise WireError(f"{Path(path).name} has no vectors that Vectors.save wrote", where=user_line()) from error
        if len(own.layers) != len(own.tensor):
            raise WireError(f"{Path(path).name} has {len(own.tensor)} vectors for {len(own.layers)} layers")
        return own


def contrastive_vectors(
    model: Model,
    positive: Any,
    negative: Any,
    *,
    layers: Layers = None,
    positions: Positions = -1,
    method: str = "mean",
    of: str = "resid_post",
) -> Vectors:
    """The vector from `negative` prompts to `positive` ones at each layer.

    `method="mean"`: the difference of the two sets' means (contrastive activation addition, where prompts are pairs).
    "pca": the main direction of the differences of pairs, which are two lists of one length; of length 1, uncentred
    (the paper's pairs are in random order, which comes to the same), and pointing to the positive side on average. A
    prompt counts with its row at a position, or with the mean of its rows at several (None: of all its tokens).

    `separation` is of these same prompts, `[layer, measure]`: "distance", between the sets' means along the vector in
    units of their standard deviation, "accuracy", of deciding at the middle between the means, and "middle", where that
    is along the vector at length 1 (`gate` uses it). Sets of up to 512 prompts are one request; larger ones go through
    `model.map`, with means at the service ("pca" brings rows here).
    """
    if method not in ("mean", "pca"):
        raise GraphError(f"method is 'mean' or 'pca', not {method!r}", where=user_line())
    needs_torch("contrastive_vectors")
    check_stream(of)
    chosen = layers_of(model, layers)
    sets = [prompts_of(model, prompts).ids for prompts in (positive, negative)]
    if method == "pca" and len(sets[0]) != len(sets[1]):
        told = f"pairs are two lists of one length, and these have {len(sets[0])} and {len(sets[1])} prompts"
        raise GraphError(told, where=user_line())
    run = _in_parts if max(map(len, sets)) > _ONE_REQUEST else _at_once
    tensor, projections, receipts = run(model, sets, chosen, positions, method, of)
    return Vectors(
        tensor=tensor,
        layers=tuple(chosen),
        of=of,
        method=method,
        separation=_separation(projections, chosen),
        receipts=receipts,
    )


def activation_addition(
    model: Model, positive: str, negative: str, *, layers: Layers, pad: int | str = " ", of: str = "resid_pre"
) -> Vectors:
    """The difference of two prompts token by token, to be added to the first tokens of others (ActAdd).

    The shorter prompt is filled up behind with the token `pad`, as in the paper. `[layers, positions, hidden]`, with
    positions 0, 1, ... as the places where `steer` adds them.
    """
    torch = needs_torch("activation_addition")
    check_stream(of)
    both = [prompts_of(model, one) for one in (positive, negative)]
    if any(len(one) != 1 for one in both):
        raise GraphError(f"one prompt and one other, not {len(both[0])} and {len(both[1])}", where=user_line())
    ids = [one.ids[0] for one in both]
    longest = max(map(len, ids))
    if any(len(one) < longest for one in ids):
        ids = [[*one, *[*token_ids(model, pad)] * (longest - len(one))] for one in ids]
    chosen = layers_of(model, layers)
    with model.trace() as tracer:
        rows = []
        for one in ids:
            with tracer.invoke(one):
                rows.append([getattr(model.layers[number], of)[0].float() for number in chosen])
        difference = torch.stack([a - b for a, b in zip(*rows, strict=True)]).save()
    return Vectors(
        tensor=difference,
        layers=tuple(chosen),
        positions=tuple(range(longest)),
        of=of,
        method="activation addition",
        receipts=(tracer.receipt,),
    )


# --- one request


def _at_once(
    model: Model, sets: Sequence[Any], layers: Sequence[int], positions: Any, method: str, of: str
) -> tuple[Any, list[Any], tuple[Receipt, ...]]:
    torch = needs_torch("contrastive_vectors")
    rows: list[list[Any]] = []
    with model.trace() as tracer:
        for prompts in sets:
            views: list[list[Any]] = []
            for first in range(0, len(prompts), _IN_ONE_VIEW):
                with tracer.invoke(prompts[first : first + _IN_ONE_VIEW]):
                    mask = tracer.mask if positions is None else None
                    views.append([_rows(model.layers[number], of, positions, mask) for number in layers])
            rows.append([torch.cat(parts) for parts in zip(*views, strict=True)])
        if method == "mean":
            found = [a.mean(0) - b.mean(0) for a, b in zip(*rows, strict=True)]
        else:
            found = [_main_direction(a - b) for a, b in zip(*rows, strict=True)]
        units = [vector / vector.norm().clamp_min(1e-30) for vector in found]
        told = [torch.stack([own @ unit for own, unit in zip(one, units, strict=True)]).save() for one in rows]
        tensor = torch.stack(found).save()
    return tensor, told, (tracer.receipt,)


def _rows(layer: Module, of: str, positions: Any, mask: Any) -> Any:
    """`[prompts, hidden]`."""
    residual = getattr(layer, of)
    if positions is None:
        kept = mask[..., None].float()
        return (residual.float() * kept).sum(1) / kept.sum(1)
    rows = residual.at(positions).float()
    return rows if scalar(positions) is not None else rows.mean(1)


def _main_direction(differences_nD: Any) -> Any:
    """The first right singular vector, of length 1, to the side where differences are on average."""
    torch = needs_torch("contrastive_vectors")
    first = torch.linalg.svd(differences_nD, full_matrices=False)[2][0]
    return torch.where((differences_nD @ first).mean() < 0, -first, first)


# --- many requests


def _in_parts(
    model: Model, sets: Sequence[Any], layers: Sequence[int], positions: Any, method: str, of: str
) -> tuple[Any, list[Any], tuple[Receipt, ...]]:
    """As at once: two maps for the vectors, and two for how far they tell the sets apart."""
    import polytrace

    torch = needs_torch("contrastive_vectors")

    def rows() -> dict[int, Any]:
        found = {}
        for number in layers:
            residual = getattr(model.layers[number], of)  # one prompt, without pads
            rows = (residual if positions is None else residual.at(positions)).float()
            found[number] = rows if scalar(positions) is not None else rows.mean(1)
        return found

    def means() -> dict[str, Any]:
        return {str(number): polytrace.mean(value) for number, value in rows().items()}

    if method == "mean":
        both = [model.map(prompts, means).run() for prompts in sets]
        tensor = torch.stack([(both[0][str(one)] - both[1][str(one)]).float() for one in layers])
    else:
        plain = [
            model.map(prompts, lambda: {str(number): value for number, value in rows().items()}) for prompts in sets
        ]
        own = [list(mapping) for mapping in plain]
        whole = [{one: torch.cat([part[str(one)] for part in parts]) for one in layers} for parts in own]
        tensor = torch.stack([_main_direction(whole[0][one] - whole[1][one]) for one in layers])
    units = tensor / tensor.norm(dim=1, keepdim=True).clamp_min(1e-30)

    def projected() -> dict[str, Any]:
        values = rows()
        dots = [value @ unit for value, unit in zip(values.values(), units, strict=True)]
        return {"dots": torch.stack(dots, 1)}

    told = [torch.cat([part["dots"] for part in model.map(prompts, projected)]).T for prompts in sets]
    return tensor, told, ()


# --- what comes back


def _separation(projections: Sequence[Any], layers: Sequence[int]) -> DataArray:
    torch = needs_torch("contrastive_vectors")
    above, below = projections  # [layers, prompts]
    means = above.mean(1), below.mean(1)
    centred = torch.cat([one - mean[:, None] for one, mean in zip((above, below), means, strict=True)], 1)
    spread = (centred.square().sum(1) / max(1, centred.shape[1] - 2)).sqrt()
    middle = ((means[0] + means[1]) / 2)[:, None]
    right = torch.cat([above > middle, below < middle], 1).float().mean(1)
    return _labelled(torch.stack([(means[0] - means[1]) / spread, right, middle[:, 0]], 1), layers)


def _labelled(values: Any, layers: Sequence[int]) -> DataArray:
    return labelled(values, {"layer": list(layers), "measure": list(_MEASURES)}, name="separation")
