"""Activations of a dataset in a folder, for probes and dictionaries: written by a map, read part by part.

A folder has numbered safetensors files and `index.json`; the same call goes on behind the last complete part after a
crash. Nothing here holds more than a part in memory.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polytrace.errors import ConflictError, GraphError, NotFoundError
from polytrace.lines import user_line
from polytrace.methods.imports import needs_torch
from polytrace.methods.places import Layers, Positions, layers_of
from polytrace.points import DIMS

if TYPE_CHECKING:
    from polytrace.maps.parts import Part
    from polytrace.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows for a probe, in the order of the dataset or shuffled within their part."""

    rows: Any  # [rows, ...]: of the point, [rows, hidden] for those of the residual
    prompts: Any  # [rows] int64: number of the row's prompt in the dataset
    places: Any  # [rows] int64: which of the positions that were collected, or of the tokens; 0 for one position
    labels: Any | None  # [rows], where labels were given


def collect_activations(
    model: Model,
    dataset: Any,
    *,
    to: str | os.PathLike[str],
    of: str | Sequence[str] = "resid_post",
    layers: Layers = None,
    positions: Positions = None,
    on_error: str = "raise",
) -> Activations:
    """What named points have for each prompt of a dataset, in a folder (or `s3://...`); returns its reader.

    `dataset` is what `model.map` takes: prompts, a generator, the path of a file. `of`: names such as "resid_post",
    "z", "mlp_post" (of dimensions sequence and token), kept under "resid_post.3". `positions`: an int (counted in each
    prompt) keeps one row, a list several, None all tokens. Raises ConflictError where the folder is of another dataset,
    model or choice.
    """
    names = [of] if isinstance(of, str) else list(of)
    for name in names:
        if DIMS.get(name, ())[:2] != ("sequence", "token"):
            known = ", ".join(name for name, dims in DIMS.items() if dims[:2] == ("sequence", "token"))
            raise GraphError(f"{name!r} has no row for each token; collected are {known}", where=user_line())
    chosen = layers_of(model, layers)

    def body() -> dict[str, Any]:
        values = {f"{name}.{number}": getattr(model.layers[number], name) for name in names for number in chosen}
        return {name: _picked(value, positions) for name, value in values.items()}

    for _ in model.map(dataset, body, to=to, on_error=on_error):
        pass
    return Activations(to)


def _picked(value: Any, positions: Positions) -> Any:
    """Of one prompt, so without pads."""
    if positions is None:
        return value
    return value.at(positions)


class Activations:
    """A folder that `collect_activations` has filled, or is filling: what is complete can be read."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        """Raises NotFoundError where there is none."""
        from polytrace.maps.folders import open_folder
        from polytrace.maps.index import NAME, Cut, Index

        self.place = os.fspath(place)
        folder = open_folder(place)
        data = folder.read(NAME)
        if data is None:
            raise NotFoundError(
                f"there are no activations in {self.place}: collect_activations(..., to=...) makes them"
            )
        told = json.loads(data)
        self._index = Index(folder, {}, Cut(**told["cut"]), told["parts"], told["is_complete"])
        self.is_complete: bool = told["is_complete"]
        self.names: tuple[str, ...] = tuple(self._part(0).names) if told["parts"] else ()

    def __len__(self) -> int:
        """Prompts that have rows."""
        return sum(part["prompts"][1] - part["prompts"][0] - part["skipped"] for part in self._index.parts)

    def __iter__(self) -> Iterator[Part]:
        """The parts, one in memory at a time."""
        return (self._part(place) for place in range(len(self._index.parts)))

    def array(self, name: str) -> Any:
        """All rows of a name in one tensor, those of ragged prompts end to end: for what fits into memory."""
        torch = needs_torch("reading activations")
        self._check(name)
        parts = [part[name] for part in self]
        if len({part.shape[1:] for part in parts}) > 1:  # prompts of one part are of one length by chance
            parts = [_rows(part, name)[2] for part in self]
        return torch.cat(parts)

    def batches(
        self, name: str, size: int = 256, *, labels: Sequence[Any] | None = None, shuffle: int | None = None
    ) -> Iterator[Batch]:
        """Rows of a name for a probe. `labels`: one for each prompt of the dataset. `shuffle`: a seed.

        Shuffled, parts come in another order, and so do the rows within each. The last batch of a part may be smaller.
        """
        torch = needs_torch("reading activations")
        self._check(name)
        order = list(range(len(self._index.parts)))
        draw = None if shuffle is None else random.Random(shuffle)
        if draw is not None:
            draw.shuffle(order)
        told = None if labels is None else torch.as_tensor(labels)
        for place in order:
            part = self._part(place)
            prompts, places, rows = _rows(part, name)
            if told is not None and part.prompts.stop > len(told):
                raise GraphError(
                    f"there are {len(told)} labels, and a prompt {part.prompts.stop - 1}", where=user_line()
                )
            found = list(range(len(rows)))
            if draw is not None:
                draw.shuffle(found)
            for start in range(0, len(found), size):
                chosen = torch.tensor(found[start : start + size])
                own = prompts[chosen]
                yield Batch(
                    rows=rows[chosen],
                    prompts=own,
                    places=places[chosen],
                    labels=None if told is None else told[own],
                )

    def _part(self, place: int) -> Part:
        part = self._index.read(place)
        if part is None:
            name = self._index.parts[place]["file"]
            raise ConflictError(f"{self.place}/{name} is not what index.json says: collect again to mend the folder")
        return part

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise NotFoundError(f"{self.place} has no {name!r}; it has {', '.join(self.names)}")


def _rows(part: Part, name: str) -> tuple[Any, Any, Any]:
    """Numbers of prompts, places in them, and rows: one for each position of each prompt."""
    torch = needs_torch("reading activations")
    own = part.rows(name)
    point = name.rpartition(".")[0]
    tail = len(DIMS[point]) - 2  # dimensions of one row
    lengths = [row.shape[0] if row.ndim > tail else 1 for row in own]
    rows = torch.cat([row if row.ndim > tail else row[None] for row in own])
    prompts = torch.tensor(
        [number for number, length in zip(part.numbers, lengths, strict=True) for _ in range(length)]
    )
    return prompts, torch.tensor([place for length in lengths for place in range(length)]), rows
