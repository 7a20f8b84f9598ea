"""GPUs of the one shard of a model that a device map spreads: as many as that needs, on one machine."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.deployment import DeploymentConfig, plan_placement
from cluster.mapped_gpus import check_mapped, most_gpus
from polytrace.device_maps import checked_device_map
from polytrace.errors import ServiceError, UserError

HOST = {"vit": "cpu", "classifier": "disk"}
TWO = {"vit.embeddings": "cuda", "vit.layers": "cuda:1", "classifier": "cpu"}


@pytest.mark.parametrize(
    ("device_map", "flags", "node_gpus", "expected"),
    [
        ("auto", {}, 0, (0, "cpu", "gloo")),
        ("auto", {}, 8, (1, "cuda", "nccl")),
        ("balanced", {"gpus": 4}, 8, (4, "cuda", "nccl")),
        ("auto", {"device": "cpu"}, 8, (0, "cpu", "gloo")),
        (HOST, {}, 8, (0, "cpu", "gloo")),
        (HOST, {}, 0, (0, "cpu", "gloo")),
        (TWO, {}, 8, (2, "cuda", "nccl")),
        (TWO, {"gpus": 3}, 3, (3, "cuda", "nccl")),
    ],
)
def test_a_shard_has_the_gpus_that_its_device_map_needs(
    device_map: Any, flags: dict[str, Any], node_gpus: int, expected: tuple[object, ...]
) -> None:
    config = DeploymentConfig(name="vit", source="-", device_map=checked_device_map(device_map), **flags)
    found = plan_placement(config, cluster_cpus=16, cluster_gpus=4 * node_gpus, node_gpus=node_gpus)
    assert (found.gpus, found.device, found.backend) == expected


@pytest.mark.parametrize(
    ("device_map", "flags", "told"),
    [
        ("auto", {"gpus": 2}, "vit: its device map needs a machine with 2 GPUs, and the one with most has 1"),
        (TWO, {}, "a machine with 2 GPUs, and the one with most has 1: place its parts on fewer"),
        (TWO, {"gpus": 5}, "a machine with 5 GPUs"),
    ],
)
def test_gpus_of_several_machines_are_none_of_one(device_map: Any, flags: dict[str, Any], told: str) -> None:
    config = DeploymentConfig(name="vit", source="-", device_map=checked_device_map(device_map), **flags)
    with pytest.raises(ServiceError, match=told):
        plan_placement(config, cluster_cpus=16, cluster_gpus=8, node_gpus=1)
    with pytest.raises(ServiceError, match="has 0"):
        plan_placement(config, cluster_cpus=16, cluster_gpus=0, node_gpus=0)


def test_the_machine_with_most_gpus_counts_while_it_lives() -> None:
    nodes = [(2.0, True), (8.0, False), (0.0, True)]
    told = [{"Alive": alive, "Resources": {"CPU": 4.0} | ({"GPU": gpus} if gpus else {})} for gpus, alive in nodes]
    assert most_gpus(told) == 2
    assert most_gpus([]) == 0


@pytest.mark.parametrize(
    ("device_map", "wrong", "told"),
    [
        (None, {"gpus": 2}, "gpus is 2: it is for a device map"),
        ("auto", {"stages": 2}, "stages is 2 and ranks 1, and a device map spreads a model within one shard"),
        ("auto", {"ranks": 4}, "stages is 1 and ranks 4"),
        ("auto", {"offload_bytes": 5}, 'put parts on "cpu" or "disk" in the device map'),
        ("auto", {"gpus": 0}, "gpus is 0; it is at least 1"),
        ("auto", {"gpus": 2, "device": "cpu"}, "device is cpu, and the device map or gpus asks for GPUs"),
        (TWO, {"device": "cpu"}, "device is cpu, and the device map or gpus asks for GPUs"),
        (TWO, {"gpus": 1}, "gpus is 1, and the device map names GPU 1: it is at least 2"),
        (HOST, {"gpus": 1}, "the device map names no GPU: leave out gpus"),
        (HOST, {"device": "cuda"}, "the device map names no GPU"),
    ],
)
def test_what_contradicts_a_device_map_is_told(device_map: Any, wrong: dict[str, Any], told: str) -> None:
    asked: dict[str, Any] = {"device": "auto", "gpus": None, "stages": 1, "ranks": 1, "offload_bytes": 0}
    places = None if device_map is None else checked_device_map(device_map)
    check_mapped(places, **asked)
    with pytest.raises(UserError, match=told):
        check_mapped(places, **asked | wrong)
