"""Certificates and prices as people read them: plain text, a line a figure."""

from __future__ import annotations

from collections.abc import Iterable

from polytrace.certificate import Certificate, LimitLine, Price, ValueShape

_UNITS = ("B", "KB", "MB", "GB", "TB")
MEANINGS = {  # of the names of limits
    "requests_in_flight": "requests in flight",
    "tokens_a_day": "tokens today",
    "bytes_stored": "bytes stored",
    "requests_a_minute": "requests a minute",
    "request_bytes": "request",
    "result_bytes": "result",
    "token_layers": "token-layers",
    "passes": "passes",
    "tape_bytes": "tapes of gradients, a shard",
}


def table_of_certificate(one: Certificate) -> str:
    """What a request would cost and return; the limits behind it where a service was asked."""
    split = f" ({one.split} of them because its rows do not fit into fewer)" if one.split else ""
    lines = [
        ("passes", f"{one.passes}{split}"),
        ("tokens", f"{one.tokens:,}"),
        ("token-layers", f"{one.token_layers:,} ({one.token_layers_alone:,} if every sequence ran whole)"),
        ("operations of its own", f"{one.op_flops:,} FLOPs"),
        ("result", f"{in_bytes(one.result_bytes)}, instead of {in_bytes(one.read_bytes)} that it reads"),
        ("stays on the service", in_bytes(one.kept_bytes)),
        ("over links", in_bytes(one.link_bytes)),
        (
            "memory of a shard",
            f"{in_bytes(one.shard_bytes)}: rows {in_bytes(one.row_bytes)}, values {in_bytes(one.live_bytes)}, "
            f"tapes {in_bytes(one.tape_bytes)}, kept rows {in_bytes(one.trunk_bytes)}",
        ),
        ("price", f"{one.price:,.1f} token-layers"),
    ]
    parts = [_aligned(lines)]
    if one.saves:
        parts.append(_aligned((f"save {name}", f"{shape.dtype} {list(shape.shape)}") for name, shape in _first(one)))
    if one.limits:
        parts.append(_aligned((MEANINGS.get(line.what, line.what), _told(line)) for line in one.limits))
        parts.append("would be taken now" if one.is_admitted else f"would be refused: {one.refusal}")
    return "\n".join([*parts, *one.notes])


def table_of_price(price: Price) -> str:
    """What several requests cost together."""
    told = _aligned(
        [
            ("requests", f"{price.requests:,}"),
            ("passes", f"{price.passes:,}"),
            ("tokens", f"{price.tokens:,}"),
            ("token-layers", f"{price.token_layers:,} ({price.token_layers_alone:,} if every sequence ran whole)"),
            ("operations of their own", f"{price.op_flops:,} FLOPs"),
            ("results", in_bytes(price.result_bytes)),
            ("moved", in_bytes(price.moved_bytes)),
            ("memory of a shard", f"{in_bytes(price.shard_bytes)}, for the one that takes most"),
            ("price", f"{price.charged:,.1f} token-layers"),
        ]
    )
    partial = ["what comes behind a place that needs a result is not in it"] if price.is_partial else []
    return "\n".join([told, *(f"would be refused: {why}" for why in price.refusals), *partial])


def in_bytes(count: int) -> str:
    """A number of bytes with three digits, as 1.23 GB."""
    size, unit = float(count), 0
    while size >= 999.5 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{count} B" if unit == 0 else f"{size:.3g} {_UNITS[unit]}"


def _first(one: Certificate, most: int = 20) -> Iterable[tuple[str, ValueShape]]:
    return list(one.saves.items())[:most]


def _told(line: LimitLine) -> str:
    used = f", {line.used:,} used" if line.used else ""
    if line.limit is None:
        return f"{line.needed:,}; no limit"
    return f"{line.needed:,} of {line.limit:,}{used} ({line.whose}){'' if line.is_within else '  <- too much'}"


def _aligned(lines: Iterable[tuple[str, str]]) -> str:
    known = list(lines)
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name:<{width}}  {told}" for name, told in known)
