"""Where operations leave the calls that work out elements of many: along dimensions, products, attention, norms."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.call_axis import MIXED, SAME, Along, Content, Mixed, Place, Same, Total
from engine.call_step import Rule, Step, joined, plain, varies

_FACTORS = (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2"), ("self", "vec"))
_ONCE = frozenset({"all", "any", "amax", "amin", "max", "min", "_is_all_true", "_is_any_true"})
_IN_COMMON = (Content.SAME, Content.ARGUMENT)
_LIKENESS = frozenset({"all", "any", "_is_all_true", "_is_any_true"})


def _within(name: str, *, drops: bool = False) -> Rule:
    """Along one or several dimensions, of which the calls' is none. `drops`: these are gone behind it."""

    def rule(step: Step) -> Place:
        place = step.place(step.first)
        if not isinstance(place, Along):
            return place
        dims = step.dims(name)
        if place.dim in dims:
            return MIXED
        return plain(place.to(place.dim - sum(dim < place.dim for dim in dims) if drops else place.dim))

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
    return plain(place.to(place.dim - gone))


def _has_places(step: Step) -> bool:
    """Whether it also says where the largest or the least is."""
    return step.name in ("max", "min") and "dim" in step.arguments


def _layer_norm(step: Step) -> Place:
    normalised = range(step.first.ndim - len(step.arguments["normalized_shape"]), step.first.ndim)
    place, *others = [step.place(tensor) for tensor in step.tensors]
    if any(not isinstance(one, Same) for one in others) or isinstance(place, Mixed):
        return MIXED
    if isinstance(place, Along):
        return MIXED if place.dim in normalised else plain(place)
    return place


def _members(step: Step) -> Place:
    """Along the first dimension, member by member; weights are the same for all."""
    place = step.place(step.first)
    if any(not isinstance(step.place(one), Same) for one in step.tensors if one is not step.first):
        return MIXED
    if isinstance(place, Along):
        return plain(place) if not place.dim and not step.arguments.get("training", False) else MIXED
    return place


def _attention(step: Step) -> Place:
    """Queries, keys and values have the calls in the batch; so has a mask, or it is the same for all."""
    query, key, value = (step.arguments[name] for name in ("query", "key", "value"))
    place = joined(step, [query, key, value], query.ndim)
    if isinstance(place, Mixed) or step.arguments.get("dropout_p"):
        return MIXED
    if isinstance(place, Along) and (
        place.dim or any(isinstance(step.place(one), Same) for one in (query, key, value))
    ):
        return MIXED
    masks = [mask for name in ("attn_mask", "attn_bias") if isinstance(mask := step.arguments.get(name), Tensor)]
    return joined(step, [query, *masks], query.ndim) if masks else place


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
        return plain(left)
    if isinstance(left, Same) and isinstance(right, Along) and other.ndim == rank and right.dim == rank - 1:
        return plain(right)
    if rank == 3 and isinstance(left, Along) and isinstance(right, Along) and left.is_at(right) and not left.dim:
        return joined(step, [one, other], rank)
    return MIXED


def _sum_with_product(step: Step) -> Place:
    """`addmm` and `baddbmm`."""
    product, own = _product(step), step.place(step.first)
    if not isinstance(product, Along):
        return product if isinstance(own, Same) else MIXED
    if isinstance(own, Along):
        is_beside = own.to(own.dim + step.out.ndim - step.first.ndim).is_at(product)
        return product.of(Content.OWN) if is_beside and own.content is not Content.COUNT else MIXED
    return product if isinstance(own, Same) and not varies(step, step.first, product, step.out.ndim) else MIXED


SUMS: dict[str, Rule] = {
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
}
