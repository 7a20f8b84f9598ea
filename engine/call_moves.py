"""Where operations leave the calls that give elements another place, and those that make tensors of one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.call_axis import MIXED, SAME, Along, Content, Place, Same, reshaped
from engine.call_step import Rule, Step, joined, plain, unknown, varies


def _copied(step: Step) -> Place:
    """The elements of one tensor, perhaps of another dtype."""
    kept = step.out.dtype in (torch.bool, step.first.dtype)
    return joined(step, [step.first], step.out.ndim, keeps=kept)


def _copied_into(step: Step) -> Place:
    place = joined(step, [step.arguments["src"]], step.first.ndim)
    own = step.place(step.first)
    if isinstance(place, Same) and isinstance(own, Along):
        return MIXED if varies(step, step.arguments["src"], own, step.first.ndim) else own.of(Content.SAME)
    return place


def _filled(step: Step) -> Place:
    """Of the shape of one tensor, and all the same."""
    place = step.place(step.first)
    if any(not isinstance(step.place(one), Same) for one in step.tensors if one is not step.first):
        return MIXED
    return place.of(Content.SAME) if isinstance(place, Along) else place


def _larger(step: Step) -> Place:
    """The same, or with as many times the rows of a call as there are calls."""
    shape = tuple(step.out.shape)
    if shape == step.alone:
        return SAME
    if len(shape) == len(step.alone):
        others = [dim for dim, size in enumerate(shape) if size != step.alone[dim]]
        if len(others) == 1 and shape[others[0]] == step.calls * step.alone[others[0]]:
            return Along(others[0], 1, step.alone[others[0]], Content.SAME)
    return MIXED


def _counted(step: Step) -> Place:
    place = _larger(step)
    if isinstance(place, Same):
        return place
    is_from_0 = step.arguments.get("start", 0) == 0 and step.arguments.get("step", 1) == 1
    return place.of(Content.COUNT) if isinstance(place, Along) and is_from_0 else MIXED


def _expanded(step: Step) -> Place:
    place = step.place(step.first)
    if isinstance(place, Same):
        return _larger(step)
    return place.to(place.dim + step.out.ndim - step.first.ndim) if isinstance(place, Along) else MIXED


def _repeated(step: Step) -> Place:
    place = step.place(step.first)
    if isinstance(place, Same):
        return _larger(step)
    if not isinstance(place, Along) or place.content is Content.COUNT:
        return MIXED
    dim = place.dim + step.out.ndim - step.first.ndim
    return Along(dim, place.before * step.arguments["repeats"][dim], place.inside, place.content)


def _viewed(step: Step) -> Place:
    place = step.place(step.first)
    if "dtype" in step.arguments:
        return plain(place) if step.out.itemsize == step.first.itemsize else unknown(step)
    if isinstance(place, Along):
        return reshaped(place, step.first.shape, step.out.shape, step.calls)
    return place


def _moved(order: Callable[[Step], Sequence[int]]) -> Rule:
    """Dimensions in another order: which of the first argument's each of the new ones is."""

    def rule(step: Step) -> Place:
        place = step.place(step.first)
        return place.to(list(order(step)).index(place.dim)) if isinstance(place, Along) else place

    return rule


def _swapped(step: Step) -> Sequence[int]:
    order = list(range(step.first.ndim))
    one, other = (
        (step.arguments["dim0"] % len(order), step.arguments["dim1"] % len(order))
        if "dim0" in step.arguments
        else (0, len(order) - 1)
    )
    order[one], order[other] = order[other], order[one]
    return order


def _in_order(step: Step) -> Sequence[int]:
    return [dim % step.first.ndim for dim in step.arguments["dims"]]


def _all_in_order(step: Step) -> Sequence[int]:
    return range(step.first.ndim)


def _unsqueezed(step: Step) -> Place:
    place, dim = step.place(step.first), step.arguments["dim"] % step.out.ndim
    return place.to(place.dim + (dim <= place.dim)) if isinstance(place, Along) else place


def _squeezed(step: Step) -> Place:
    place = step.place(step.first)
    if not isinstance(place, Along):
        return place
    gone = [dim for dim in step.dims("dim") if step.first.shape[dim] == 1]
    return place.to(place.dim - sum(dim < place.dim for dim in gone))


def _put_together(step: Step) -> Place:
    """`cat` and `stack`."""
    tensors = [one for one in step.arguments["tensors"] if one.ndim != 1 or len(one) or step.name == "stack"]
    places = [step.place(one) for one in tensors]
    if all(isinstance(one, Same) for one in places):
        return SAME
    first, dim = places[0], step.arguments.get("dim", 0) % step.out.ndim
    if not isinstance(first, Along) or any(not isinstance(one, Along) or not one.is_at(first) for one in places):
        return MIXED
    contents = {one.content for one in places if isinstance(one, Along)}
    if Content.COUNT in contents or (step.name == "cat" and dim == first.dim):
        return MIXED
    moved = first.to(first.dim + (dim <= first.dim)) if step.name == "stack" else first
    return moved.of(Content.SAME if contents == {Content.SAME} else Content.OWN)


def _sliced(step: Step) -> Place:
    place = step.place(step.first)
    if isinstance(place, Along) and step.dims("dim") == (place.dim,):
        return place if step.out.shape == step.first.shape else MIXED
    return place if step.out.shape == step.first.shape else plain(place)


def _padded(step: Step) -> Place:
    place, pad = step.place(step.first), step.arguments["pad"]
    if isinstance(place, Along):
        is_padded = 2 * (step.first.ndim - place.dim) <= len(pad) and any(
            pad[2 * (step.first.ndim - 1 - place.dim) :][:2]
        )
        return MIXED if is_padded else plain(place)
    return place


def _last_two(step: Step) -> Place:
    """`tril` and `triu`."""
    place = step.place(step.first)
    return plain(place) if isinstance(place, Along) and place.dim < step.first.ndim - 2 else unknown(step)


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "_to_copy", "alias", "detach", "lift_fresh"), _copied),
    "copy_": _copied_into,
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "fill_", "zero_"), _filled),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "scalar_tensor"), _larger),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _larger),
    "arange": _counted,
    "expand": _expanded,
    "repeat": _repeated,
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias"), _viewed),
    **dict.fromkeys(("transpose", "t"), _moved(_swapped)),
    "permute": _moved(_in_order),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _moved(_all_in_order)),
    "unsqueeze": _unsqueezed,
    "squeeze": _squeezed,
    **dict.fromkeys(("cat", "stack"), _put_together),
    "slice": _sliced,
    "constant_pad_nd": _padded,
    **dict.fromkeys(("tril", "triu"), _last_two),
}
