"""How many GPUs the one shard of a deployment with a device map gets of the cluster. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from polytrace.device_maps import DeviceMap, num_gpus
from polytrace.errors import ServiceError, UserError


def check_mapped(
    device_map: DeviceMap | None, *, device: str, gpus: int | None, stages: int, ranks: int, offload_bytes: int
) -> None:
    """UserError where what a deployment is asked for contradicts its device map on any cluster."""
    if device_map is None:
        if gpus is not None:
            raise UserError(f"gpus is {gpus}: it is for a device map; without one each shard has one GPU")
        return
    if stages > 1 or ranks > 1:
        told = f"stages is {stages} and ranks {ranks}, and a device map spreads a model within one shard"
        raise UserError(f"{told}: leave out the one or the other")
    if offload_bytes:
        raise UserError('offload_bytes is for language models: put parts on "cpu" or "disk" in the device map')
    named = num_gpus(device_map)
    if gpus is not None and gpus < 1:
        raise UserError(f"gpus is {gpus}; it is at least 1")
    if named == 0 and (gpus is not None or device == "cuda"):
        raise UserError("the device map names no GPU: leave out gpus and device, or place parts on 0, 1, ...")
    if named is not None and gpus is not None and gpus < named:
        raise UserError(f"gpus is {gpus}, and the device map names GPU {named - 1}: it is at least {named}")
    if device == "cpu" and (gpus or named):
        raise UserError("device is cpu, and the device map or gpus asks for GPUs: leave out the one or the other")


def mapped_gpus(name: str, device_map: DeviceMap, *, device: str, gpus: int | None, node_gpus: float) -> int:
    """GPUs of the shard; 0: it runs on CPUs. A mapping has those that it names; a name of accelerate's has `gpus`, else
    one, else the CPUs where the cluster has no GPU. ServiceError when no machine has so many (`node_gpus`: the most).
    """
    named = num_gpus(device_map)
    is_free = named is None and gpus is None and device != "cuda"  # a name, which takes what there is
    if named == 0 or device == "cpu" or (is_free and node_gpus < 1):
        return 0
    wanted = gpus or named or 1
    if node_gpus < wanted:
        told = f"{name}: its device map needs a machine with {wanted} GPUs, and the one with most has {node_gpus:g}"
        raise ServiceError(f'{told}: place its parts on fewer GPUs, and on "cpu" and "disk"')
    return wanted


def most_gpus(nodes: Iterable[Mapping[str, Any]]) -> float:
    """Of the machine that has most, of those that Ray knows."""
    return max((node["Resources"].get("GPU", 0.0) for node in nodes if node["Alive"]), default=0.0)
