"""Positions in time, height and width, of models where they follow from the images before a token.

A row's come from its sequence's prompt, by the model's own `get_rope_index`, so rows that sequences share have the
same; behind the prompt they count on. Every stage gives them to the text model, whose forward makes rotary tables of
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.copies import to_device
from engine.imaged import plain_tokens
from engine.streams import Stream, Streams
from polytrace.graph import Invoke
from polytrace.images import image_of, images_by_digest, is_image_row
from scheduling.plan import NO_ROWS

if TYPE_CHECKING:
    from engine.fragments import RequestState

# T = rows of the root, L = tokens of a prompt

_DIMS = 3  # time, height, width


def takes_grids(model: nn.Module) -> bool:
    """Whether a model tells positions by the grids of images."""
    root: Any = model
    return hasattr(root.base_model, "get_rope_index")


@dataclass(frozen=True, slots=True)
class PromptPositions:
    """Of one sequence."""

    prompt_3L: Sequence[Sequence[int]]
    after: int  # how far positions behind the prompt are from counting tokens

    def at(self, dim: int, position: int) -> int:
        own = self.prompt_3L[dim]
        return own[position] if position < len(own) else position + self.after


def positions_of(model: nn.Module, invoke: Invoke, place: int) -> PromptPositions:
    """Of one of an invoke's prompts, by the model's own rule."""
    root: Any = model
    sequence = invoke.sequences[place]
    images = images_by_digest([invoke])
    grids = [images[image_of(token)[0]].grid for token in sequence if is_image_row(token) and image_of(token)[1] == 0]
    if not grids:
        return PromptPositions([range(len(sequence))] * _DIMS, 0)
    found_31L, after = root.base_model.get_rope_index(
        input_ids=torch.tensor([plain_tokens(model, sequence)]),
        mm_token_type_ids=torch.tensor([[int(is_image_row(token)) for token in sequence]]),
        image_grid_thw=torch.tensor(grids),
    )
    return PromptPositions(found_31L[:, 0].tolist(), int(after.flatten()[0]))


def positions_of_pass(model: nn.Module, streams: Streams, states: Sequence[RequestState]) -> Tensor | None:
    """`[3, 1, T]`; None where nobody's follow from images."""
    if not takes_grids(model) or not any(state.brought.images for state in states):
        return None
    table = [list(streams.positions()) for _ in range(_DIMS)]
    first = streams.layer(0)
    for view in streams.plan.views:
        brought = states[view.member].brought
        for place, segment in enumerate(view.segments if brought.images else ()):
            if segment != NO_ROWS:
                own = brought.positions(view.invoke, place)
                for row, position in _rows_of(first, segment):
                    if row < len(table[0]):  # of trunks those alone that rows are born from
                        for dim in range(_DIMS):
                            table[dim][row] = own.at(dim, position)
    return to_device(table, streams.device)[:, None]


def _rows_of(stream: Stream, segment: int) -> Iterator[tuple[int, int]]:
    """The rows of a sequence and their positions: its own, and those of what it forks from, trunks included."""
    owner: int | None = segment
    stop: int | None = None
    while owner is not None:
        one = stream.segments[owner]
        begin = stream.starts[owner]
        last = one.stops[stream.level] if stop is None else min(stop, one.stops[stream.level])
        for position in range(begin, last):
            yield stream.bases[owner] + position - begin, position
        stop, owner = begin, one.parent


def put_in(model: nn.Module, positions_31T: Tensor) -> RemovableHandle:
    """The text model is given them, until the handle is removed."""
    root: Any = model

    def put(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": positions_31T}

    handle: RemovableHandle = root.get_decoder().register_forward_pre_hook(put, with_kwargs=True)
    return handle
