"""What the planner knows of machines: makers' data sheets, dense bf16, without sparsity."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from polytrace.errors import ServiceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One kind of GPU, and what connects them. All per GPU; bytes a second are in one direction."""

    name: str
    memory_bytes: int
    flops: float  # a second, bf16
    memory_rate: float  # bytes a second
    link_rate: float  # bytes a second between GPUs of a node
    network_rate: float  # bytes a second between nodes


GIB = 1 << 30

# name: (memory GiB, bf16 FLOPs, memory bytes, node link bytes, network bytes a second)
_SHEETS: Mapping[str, tuple[int, float, float, float, float]] = {
    "a100-40": (40, 312e12, 1.555e12, 300e9, 25e9),
    "a100": (80, 312e12, 2.039e12, 300e9, 25e9),
    "h100": (80, 989e12, 3.35e12, 450e9, 50e9),
    "h200": (141, 989e12, 4.8e12, 450e9, 50e9),
    "b200": (180, 2250e12, 8e12, 900e9, 50e9),
    "l40s": (48, 362e12, 0.864e12, 32e9, 25e9),
}

KNOWN: Mapping[str, Hardware] = {
    name: Hardware(
        name=name,
        memory_bytes=memory * GIB,
        flops=flops,
        memory_rate=memory_rate,
        link_rate=link_rate,
        network_rate=network_rate,
    )
    for name, (memory, flops, memory_rate, link_rate, network_rate) in _SHEETS.items()
}

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "tib": 1 << 40, "kb": 10**3, "mb": 10**6}
_UNITS |= {"gb": 10**9, "tb": 10**12}


def hardware_of(name: str) -> Hardware:
    """The hardware of that name. ServiceError that lists all."""
    if name not in KNOWN:
        raise ServiceError(f"there is no hardware {name!r} in the table: known are {', '.join(KNOWN)}")
    return KNOWN[name]


def parse_bytes(text: str) -> int:
    """`80GiB`, `80 GB`, `96000000000`. ServiceError when it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ServiceError(f"{text!r} is no amount of memory: write 80GiB or 80GB")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def told_bytes(count: float) -> str:
    """An amount for people, in GiB or less."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"
