"""Rows of what networks are made of beside products: normalisation, convolution, pooling, attention, losses."""

from __future__ import annotations

from polytrace.ops.spec import Cost, OpSpec, Reach, moved, op


def _layer(name: str, *kwargs: str, torch: str = "functional", **more: object) -> OpSpec:
    return op(name, *kwargs, torch=torch, **more)


def _convolution(name: str, *kwargs: str) -> OpSpec:
    usual = ("weight", "bias", "stride", "padding", "dilation", "groups")
    return op(name, *usual, *kwargs, torch="functional", cost=Cost.PRODUCT)


def _loss(name: str, *kwargs: str) -> OpSpec:
    return op(name, "target", "reduction", *kwargs, torch="functional", reach=Reach.LOSS)


NORMALISED = (
    _layer("layer_norm", "normalized_shape", "weight", "bias", "eps", reach=Reach.SHAPE),
    _layer("rms_norm", "normalized_shape", "weight", "eps", reach=Reach.SHAPE),
    _layer("group_norm", "num_groups", "weight", "bias", "eps"),
    _layer("batch_norm", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    _layer("instance_norm", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    _layer("local_response_norm", "size", "alpha", "beta", "k"),
)

WINDOWED = (
    *[_convolution(f"conv{dims}d") for dims in (1, 2, 3)],
    *[_convolution(f"conv_transpose{dims}d", "output_padding") for dims in (1, 2)],
    _layer("avg_pool1d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    _layer("avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    _layer(
        "max_pool1d", "kernel_size", "stride", "padding", "dilation", "ceil_mode", torch="functional torch.max_pool1d"
    ),
    _layer(
        "max_pool2d", "kernel_size", "stride", "padding", "dilation", "ceil_mode", torch="functional torch.max_pool2d"
    ),
    _layer("lp_pool1d", "norm_type", "kernel_size", "stride", "ceil_mode"),
    _layer("adaptive_avg_pool1d", "output_size"),
    _layer("adaptive_avg_pool2d", "output_size"),
    _layer("adaptive_max_pool1d", "output_size", torch="functional"),
    _layer("interpolate", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    moved("im2col", "kernel_size", "dilation", "padding", "stride", torch="functional.unfold", reach=Reach.WHOLE),
    _layer("fold", "output_size", "kernel_size", "dilation", "padding", "stride"),
)

LOOKED_UP = (
    moved(
        "embedding",
        "weight",
        "padding_idx",
        "norm_type",
        torch="functional",
        reach=Reach.PLACE,
    ),
    _layer(
        "scaled_dot_product_attention",
        *("key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
        first=("query",),
        cost=Cost.PRODUCT,
    ),
)

LOSSES = (
    _loss("mse_loss", "weight"),
    _loss("l1_loss", "weight"),
    _loss("smooth_l1_loss", "beta"),
    _loss("huber_loss", "delta", "weight"),
    _loss("cross_entropy", "weight", "ignore_index", "label_smoothing"),
    _loss("nll_loss", "weight", "ignore_index"),
    _loss("kl_div", "log_target"),
    _loss("binary_cross_entropy", "weight"),
    _loss("binary_cross_entropy_with_logits", "weight", "pos_weight"),
    _loss("poisson_nll_loss", "log_input", "full", "eps"),
    _loss("hinge_embedding_loss", "margin"),
    _loss("soft_margin_loss"),
    op("cosine_embedding_loss", "margin", "reduction", torch="functional"),
    op("margin_ranking_loss", "margin", "reduction", torch="functional"),
    op("triplet_margin_loss", "margin", "p", "eps", "swap", "reduction", torch="functional"),
)

ROWS = (*NORMALISED, *WINDOWED, *LOOKED_UP, *LOSSES)
