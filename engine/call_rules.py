"""Where an operation of torch leaves the calls that lie in its inputs: one rule for each kind of operation.

An operation that no rule is about, and each that goes across calls, leaves them mixed. A rule looks at places and
shapes, never at values, so what it says holds whatever calls have. That the rest is as it is of a call alone (shapes,
numbers among the arguments) is looked at by `engine.call_proof`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.call_axis import MIXED, SAME, Along, Content, Mixed, Place, Same, Total, reshaped


@dataclass(frozen=True, slots=True)
class Step:
    """An operation that has run."""

    name: str  # of torch's library, without the overload: "sum"
    arguments: Mapping[str, Any]  # by the names of its schema
    out: Tensor  # a tensor that came of it
    alone: tuple[int, ...]  # the shape of that where a call is alone
    numbers: Mapping[str, Any]  # the arguments that are no tensors, where a call is alone
    calls: int
    place: Callable[[Tensor], Place]

    @property
    def first(self) -> Tensor:
        """Its first argument, a tensor."""
        tensor: Tensor = next(iter(self.arguments.values()))
        return tensor

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All tensors among its arguments."""
        return tensors_of(self.arguments)

    def dims(self, name: str) -> tuple[int, ...]:
        """Dimensions of its first argument that another argument names, from 0 on; all where it names none."""
        given, rank = self.arguments.get(name), self.first.ndim
        named = (given,) if isinstance(given, int) else tuple(given or range(rank))
        return tuple([dim % rank for dim in named]) if rank else ()


Rule = Callable[[Step], Place]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Tensors, also in lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, Mapping):
        yield from tensors_of(list(value.values()))


def rule_of(name: str, tags: Collection[torch.Tag]) -> Rule:
    """The rule for an operation."""
    rule = _RULES.get(name)
    return rule or (_by_element if torch.Tag.pointwise in tags else _unknown)


def may_differ(step: Step) -> Collection[str]:
    """Arguments in which an operation may have other numbers than with a call alone: sizes, which shapes show."""
    if step.name == "slice":
        place = step.place(step.first)
        return ("start", "end") if isinstance(place, Along) and step.dims("dim") == (place.dim,) else ()
    if step.name == "eq" and isinstance(step.place(step.first), Total):
        return ("other",)
    return _SIZES.get(step.name, ())


def _unknown(step: Step) -> Place:
    return SAME if all(isinstance(step.place(tensor), Same) for tensor in step.tensors) else MIXED


def _joined(step: Step, tensors: Sequence[Tensor], rank: int, keeps: bool = False) -> Place:
    """Of elements of several tensors that are put beside each other as shapes are, from the last dimension on."""
    found: Along | None = None
    contents: set[Content] = set()
    for tensor in tensors:
        place = step.place(tensor)
        if isinstance(place, (Mixed, Total)):
            return MIXED
        if isinstance(place, Along):
            moved = place.to(place.dim + rank - tensor.ndim)
            if found is not None and not found.is_at(moved):
                return MIXED
            found = moved
            contents.add(place.content)
    if found is None:
        return SAME
    for tensor in tensors:
        dim = found.dim - rank + tensor.ndim
        if isinstance(step.place(tensor), Same) and dim >= 0 and tensor.shape[dim] != 1:
            return MIXED  # it may be another one for each call
    if contents == {Content.SAME}:
        return found.of(Content.SAME)
    if keeps and len(tensors) == 1:
        return found
    return MIXED if Content.COUNT in contents else found.of(Content.OWN)


def _by_element(step: Step) -> Place:
    return _joined(step, list(step.tensors), step.out.ndim)


def _compared(step: Step) -> Place:
    """`eq`. Whether all are true is the same for calls that have this in common, and so for all of them together."""
    total = step.place(step.first)
    if isinstance(total, Total):
        other, own = step.arguments["other"], step.numbers["other"]
        is_all = isinstance(other, int) and other == total.elements == step.calls * own
        return SAME if is_all else MIXED
    return _by_element(step)


def _copied(step: Step) -> Place:
    """The elements of one tensor, perhaps of another dtype."""
    kept = step.out.dtype in (torch.bool, step.first.dtype)
    return _joined(step, [step.first], step.out.ndim, keeps=kept)


def _copied_into(step: Step) -> Place:
    place = _joined(step, [step.arguments["src"]], step.first.ndim)
    own = step.place(step.first)
    if isinstance(place, Same) and isinstance(own, Along):
        dim = own.dim - step.first.ndim + step.arguments["src"].ndim
        is_one = dim < 0 or step.arguments["src"].shape[dim] == 1
        return own.of(Content.SAME) if is_one else MIXED
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
        return _plain(place) if step.out.itemsize == step.first.itemsize else _unknown(step)
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


def _unsqueezed(step: Step) -> Place:
    place, dim = step.place(step.first), step.arguments["dim"] % step.out.ndim
    return place.to(place.dim + (dim <= place.dim)) if isinstance(place, Along) else place


def _squeezed(step: Step) -> Place:
    place = step.place(step.first)
    if not isinstance(place, Along):
        return place
    gone = [dim for dim in step.dims("dim") if step.first.shape[dim] == 1]
    return place.to(place.dim - sum(dim < place.dim for dim in gone))


def _within(name: str, *, drops: bool = False) -> Rule:
    """Along one or several dimensions, of which the calls' is none. `drops`: these are gone behind it."""

    def rule(step: Step) -> Place:
        place = step.place(step.first)
        if not isinstance(place, Along):
            return place
        dims = step.dims(name)
        if place.dim in dims:
            return MIXED
        return _plain(place.to(place.dim - sum(dim < place.dim for dim in dims) if drops else place.dim))

    return rule


def _reduced(step: Step) -> Place:
    place = step.place(step.first)
    if not isinstance(place, Along):
        return place
    dims = step.dims("dim" if "dim" in step.arguments else "dims")
    if place.dim in dims:
        is_told = step.name in _ONCE and place.content is Content.SAME and not _has_places(step)
        # of all of an argument, these are what calls in one have in common (`engine.whole_contents.likeness`)
        is_all = len(dims) == step.first.ndim
        is_likeness = is_all and place.content is Content.ARGUMENT
        is_count = step.first.dtype == torch.bool and step.out.dtype == torch.int64
        if step.name == "sum" and is_all and is_count and place.content in _IN_COMMON:
            return Total(step.first.numel())
        return SAME if is_told or (is_likeness and step.name in _LIKENESS) else MIXED
    gone = 0 if step.arguments.get("keepdim", False) else sum(dim < place.dim for dim in dims)
    return _plain(place.to(place.dim - gone))


def _has_places(step: Step) -> bool:
    """Whether it also says where the largest or the least is."""
    return step.name in ("max", "min") and "dim" in step.arguments


def _layer_norm(step: Step) -> Place:
    normalised = range(step.first.ndim - len(step.arguments["normalized_shape"]), step.first.ndim)
    place, *others = [step.place(tensor) for tensor in step.tensors]
    if any(not isinstance(one, Same) for one in others) or isinstance(place, Mixed):
        return MIXED
    if isinstance(place, Along):
        return MIXED if place.dim in normalised else _plain(place)
    return place


def _plain(place: Place) -> Place:
    """Of what is worked out of a tensor, or of a part of it, at that place."""
    if not isinstance(place, Along) or place.content is Content.SAME:
        return place
    return MIXED if place.content is Content.COUNT else place.of(Content.OWN)


def _members(step: Step) -> Place:
    """Along the first dimension, member by member; weights are the same for all."""
    place = step.place(step.first)
    if any(not isinstance(step.place(one), Same) for one in step.tensors if one is not step.first):
        return MIXED
    if isinstance(place, Along):
        return _plain(place) if not place.dim and not step.arguments.get("training", False) else MIXED
    return place


def _attention(step: Step) -> Place:
    """Queries, keys and values have the calls in the batch; so has a mask, or it is the same for all."""
    query, key, value = (step.arguments[name] for name in ("query", "key", "value"))
    place = _joined(step, [query, key, value], query.ndim)
    if isinstance(place, Mixed) or step.arguments.get("dropout_p"):
        return MIXED
    if isinstance(place, Along) and (
        place.dim or any(isinstance(step.place(one), Same) for one in (query, key, value))
    ):
        return MIXED
    masks = [mask for name in ("attn_mask", "attn_bias") if isinstance(mask := step.arguments.get(name), Tensor)]
    return _joined(step, [query, *masks], query.ndim) if masks else place


def _product(step: Step) -> Place:
    """`mm` and `bmm`."""
    one, other = next(
        (step.arguments[one], step.arguments[other]) for one, other in _FACTORS if {one, other} <= step.arguments.keys()
    )
    left, right = step.place(one), step.place(other)
    rank = one.ndim
    if isinstance(left, Same) and isinstance(right, Same):
        return SAME
    if isinstance(left, Along) and isinstance(right, Same) and left.dim == rank - 2:
        return _plain(left)
    if isinstance(left, Same) and isinstance(right, Along) and other.ndim == rank and right.dim == rank - 1:
        return _plain(right)
    if rank == 3 and isinstance(left, Along) and isinstance(right, Along) and left.is_at(right) and not left.dim:
        return _joined(step, [one, other], rank)
    return MIXED


def _sum_with_product(step: Step) -> Place:
    """`addmm` and `baddbmm`."""
    product, own = _product(step), step.place(step.first)
    if not isinstance(product, Along):
        return product if isinstance(own, Same) else MIXED
    if isinstance(own, Along):
        return product.of(Content.OWN) if own.to(own.dim + step.out.ndim - step.first.ndim).is_at(product) else MIXED
    dim = product.dim - step.out.ndim + step.first.ndim
    is_one = isinstance(own, Same) and (dim < 0 or step.first.shape[dim] == 1)
    return product if is_one else MIXED


def _looked_up(step: Step) -> Place:
    table, at = step.place(step.arguments["weight"]), step.place(step.arguments["indices"])
    return _plain(at) if isinstance(table, Same) else MIXED


def _gathered(step: Step) -> Place:
    own, at = step.place(step.first), step.place(step.arguments["index"])
    (dim,) = step.dims("dim")
    if any(isinstance(one, Along) and one.content is Content.COUNT for one in (own, at)):
        return MIXED
    if isinstance(own, Along) and isinstance(at, Along) and own.is_at(at) and own.dim != dim:
        return own.of(Content.OWN)
    if isinstance(own, Same):
        return _plain(at) if isinstance(at, Same) or (isinstance(at, Along) and at.dim == dim) else MIXED
    return MIXED


def _chosen(step: Step) -> Place:
    """`index_select`."""
    own, at = step.place(step.first), step.place(step.arguments["index"])
    (dim,) = step.dims("dim")
    if isinstance(at, Same) and isinstance(own, Along):
        return MIXED if own.dim == dim else _plain(own)
    if isinstance(own, Same):
        return _plain(at.to(dim)) if isinstance(at, Along) else at
    return MIXED


def _indexed(step: Step) -> Place:
    """`tensor[indices]`, with integers."""
    own, given = step.place(step.first), step.arguments["indices"]
    indices = [(dim, at) for dim, at in enumerate(given) if at is not None]
    dims = [dim for dim, _ in indices]
    rank = max(at.ndim for _, at in indices)  # of what the indices make, in the place of the dimensions they are for
    is_together = dims == list(range(dims[0], dims[0] + len(dims)))
    start = dims[0] if is_together else 0
    if isinstance(own, Along) and own.dim in dims:
        # Each call's own rows: an index that counts the rows of all, beside indices that are each call's.
        own_at = given[own.dim]
        counting = step.place(own_at)
        is_counting = isinstance(counting, Along) and counting.content is Content.COUNT
        if not is_counting or own.before != 1 or own.content is Content.COUNT:
            return MIXED
        assert isinstance(counting, Along)
        place = counting.of(Content.OWN).to(counting.dim + rank - own_at.ndim)
        if (place.before, place.inside) != (own.before, own.inside):
            return MIXED
        others = [at for dim, at in indices if dim != own.dim]
        if others and isinstance(beside := _joined(step, others, rank), Along):
            if not beside.is_at(place):
                return MIXED
        elif others and isinstance(beside, Mixed):
            return MIXED
        if any(_varies(step, at, place, rank) for at in others):
            return MIXED
        return place.to(start + place.dim)
    place_of_indices = _joined(step, [at for _, at in indices], rank)
    if isinstance(own, Along):
        if not isinstance(place_of_indices, Same):
            return MIXED
        before = sum(dim < own.dim for dim in dims)
        return _plain(own.to(own.dim - before + (rank if not is_together or start < own.dim else 0)))
    return (
        place_of_indices.to(start + place_of_indices.dim) if isinstance(place_of_indices, Along) else place_of_indices
    )


def is_filling(arguments: Mapping[str, Any]) -> bool:
    """Whether it is an `index_put` of one number where a mask says: it does not matter at how many places."""
    indices = [at for at in arguments["indices"] if at is not None]
    is_alone = len(indices) == 1 and indices[0].dtype == torch.bool and arguments["indices"][0] is indices[0]
    return is_alone and not arguments.get("accumulate", True) and arguments["values"].numel() == 1


def _put_at(step: Step) -> Place:
    """`index_put`."""
    own, values = step.place(step.first), step.place(step.arguments["values"])
    if is_filling(step.arguments) and isinstance(values, Same):
        mask = step.arguments["indices"][0]
        if mask.ndim == step.first.ndim:
            return _joined(step, [step.first, mask], step.first.ndim)
        at = step.place(mask)  # of the first dimensions
        if isinstance(own, Along) and isinstance(at, Along) and own.is_at(at):
            return own.of(Content.OWN) if Content.COUNT not in (own.content, at.content) else MIXED
        return MIXED
    return _unknown(step)


def _varies(step: Step, tensor: Tensor, along: Along, rank: int) -> bool:
    """Whether what is the same for all may be another for each call."""
    dim = along.dim - rank + tensor.ndim
    return isinstance(step.place(tensor), Same) and dim >= 0 and tensor.shape[dim] != 1


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
    return place if step.out.shape == step.first.shape else _plain(place)


def _padded(step: Step) -> Place:
    place, pad = step.place(step.first), step.arguments["pad"]
    if isinstance(place, Along):
        is_padded = 2 * (step.first.ndim - place.dim) <= len(pad) and any(
            pad[2 * (step.first.ndim - 1 - place.dim) :][:2]
        )
        return MIXED if is_padded else _plain(place)
    return place


def _last_two(step: Step) -> Place:
    """`tril` and `triu`."""
    place = step.place(step.first)
    return _plain(place) if isinstance(place, Along) and place.dim < step.first.ndim - 2 else _unknown(step)


def _in_order(step: Step) -> Sequence[int]:
    return [dim % step.first.ndim for dim in step.arguments["dims"]]


def _all_in_order(step: Step) -> Sequence[int]:
    return range(step.first.ndim)


_FACTORS = (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"), ("self", "vec"))
_ONCE = frozenset({"all", "any", "amax", "amin", "max", "min", "_is_all_true", "_is_any_true"})
_IN_COMMON = (Content.SAME, Content.ARGUMENT)
_LIKENESS = frozenset({"all", "any", "_is_all_true", "_is_any_true"})
_SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("view", "_unsafe_view", "expand", "_reshape_alias"), ("size",)),
    **dict.fromkeys(("zeros", "ones", "full", "empty"), ("size",)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), ("size",)),
    "repeat": ("repeats",),
    "arange": ("end",),
    "native_group_norm": ("N",),
}
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("clone", "_to_copy", "alias", "detach", "lift_fresh"), _copied),
    **dict.fromkeys(("floor_divide", "masked_fill", "masked_fill_", "floor_divide_"), _by_element),
    **dict.fromkeys(("hardswish", "hardswish_", "_prelu_kernel", "log_sigmoid_forward"), _by_element),
    "copy_": _copied_into,
    "eq": _compared,
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
    **dict.fromkeys(("_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "glu"), _within("dim")),
    **dict.fromkeys(("split", "split_with_sizes"), _within("dim")),
    **dict.fromkeys(("select", "unbind"), _within("dim", drops=True)),
    "unfold": _within("dimension"),
    **dict.fromkeys(("flip", "roll"), _within("dims")),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _within("dim")),
    **dict.fromkeys(("sum", "mean", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "argmax"), _reduced),
    **dict.fromkeys(("argmin", "linalg_vector_norm", "norm", *_ONCE), _reduced),
    "native_layer_norm": _layer_norm,
    **dict.fromkeys(("convolution", "native_group_norm", "native_batch_norm"), _members),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"), _members),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool2d_with_indices"), _members),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d"), _members),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), _members),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"), _members),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "reflection_pad1d", "reflection_pad2d"), _members),
    **dict.fromkeys(("replication_pad1d", "replication_pad2d", "im2col"), _members),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _members),
    **dict.fromkeys(("_scaled_dot_product_flash_attention_for_cpu",), _attention),
    **dict.fromkeys(("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"), _attention),
    **dict.fromkeys(("_scaled_dot_product_cudnn_attention",), _attention),
    **dict.fromkeys(("mm", "bmm", "mv"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _sum_with_product),
    "embedding": _looked_up,
    "gather": _gathered,
    "index_select": _chosen,
    "index": _indexed,
    **dict.fromkeys(("index_put", "index_put_"), _put_at),
    **dict.fromkeys(("cat", "stack"), _put_together),
    "slice": _sliced,
    "constant_pad_nd": _padded,
    **dict.fromkeys(("tril", "triu"), _last_two),
}
