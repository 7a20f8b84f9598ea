"""A service on a Ray cluster of several nodes (raylets of this machine), whose nodes and drivers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from services import SCALE, Service, answer, fresh_environment, make_model, wait_until

WORK = [(layer, tuple(range(1 + layer, 20 + layer))) for layer in range(4)]
# A killed raylet is noticed after 2 s instead of 15.7; a slow one still has time to answer.
HEALTH = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_timeout_ms": 10_000}


class Nodes:
    """A head without room for shards, and nodes with room for one each."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "_system_config": HEALTH, "object_store_memory": 128 << 20},
        )
        self.address: str = self._cluster.address
        self.living: list[Any] = []

    def add(self) -> None:
        self.living.append(self._cluster.add_node(num_cpus=1, object_store_memory=128 << 20))

    def kill_one_with_a_shard(self) -> None:
        node = next(node for node in self.living if self.shards([node]))
        self.living.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def shards(self, nodes: list[Any] | None = None) -> list[int]:
        """The processes of shards on some of the nodes: children of their raylets."""
        raylets = {node.all_processes["raylet"][0].process.pid for node in (self.living if nodes is None else nodes)}
        return [pid for pid, parent in shard_processes().items() if parent in raylets]

    def end(self) -> None:
        self._cluster.shutdown()


def shard_processes() -> dict[int, int]:
    """All processes of shards on this machine, with their parents."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::ShardActor"):
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="pt", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("RAY_AUTH_MODE", "disabled")  # a cluster of this machine's loopback, gone after the tests
        patch.setenv("RAY_TMPDIR", folder)
        nodes = Nodes()
        for _ in range(3):
            nodes.add()
        yield nodes
        nodes.end()


@pytest.fixture(scope="module")
def service(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("nodes")
    flags = ("--address", nodes.address, "--stages", "2", "--cpus", "1")
    service = Service(make_model(folder / "model"), folder, *flags, RAY_AUTH_MODE="disabled")
    try:
        wait_until(service.is_ready, 240, service)
        yield service
    finally:
        service.kill_all()


@pytest.fixture(scope="module")
def calm(service: Service) -> list[bytes]:
    return answers(service)


def answers(service: Service) -> list[bytes]:
    return [answer(service, *one) for one in WORK]


def test_a_job_of_the_joined_cluster_traces_with_its_own_key_and_the_same_values(
    service: Service, nodes: Nodes, calm: list[bytes]
) -> None:
    folder = service.folder / "job"
    folder.mkdir()
    (folder / "script.py").write_text(
        "import polytrace\nmodel = polytrace.connect('ray://auto', 'tiny')\n"
        "with model.trace(list(range(4, 23))):\n"
        f"    model.model.layers[0].output[:] = model.model.layers[0].output * {SCALE}\n"
        "    out = model.model.layers[3].output.save()\n"
        "print(out.numpy().tobytes().hex())\n"
    )
    told = {"RAY_ADDRESS": nodes.address, "RAY_AUTH_MODE": "disabled"}
    for key, code in (("sesame", 0), ("", 1)):
        environment = fresh_environment(service.folder) | told | {"POLYTRACE_KEY": key}
        command = [sys.executable, "script.py"]
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=100)
        assert ran.returncode == code, ran.stderr
        if key:
            assert bytes.fromhex(ran.stdout.split()[-1]) == calm[3]
        else:
            assert "this service needs a key" in ran.stderr and "env_vars" in ran.stderr


def test_shards_of_a_node_that_dies_move_to_another_one(service: Service, nodes: Nodes, calm: list[bytes]) -> None:
    before = nodes.shards()
    nodes.kill_one_with_a_shard()
    wait_until(lambda: service.deployment()["state"] == "recovering", 60, service)
    assert answers(service) == calm
    after = nodes.shards()
    assert len(before) == len(after) == 2
    assert len(set(before) & set(after)) == 1, "the other shard keeps its process and its weights"


def test_a_deployment_without_room_says_what_it_waits_for_and_comes_back_with_a_node(
    service: Service, nodes: Nodes, calm: list[bytes]
) -> None:
    nodes.kill_one_with_a_shard()
    wait_until(lambda: service.deployment()["state"] == "waiting", 60, service)
    told = service.deployment()["progress"]
    assert "waits for room for 1 of 2 shards of CPU 1 each; free are CPU 0 of 1 on 2 nodes" in told
    (survivor,) = nodes.shards()
    nodes.add()
    wait_until(service.is_ready, 120, service)
    assert answers(service) == calm
    assert survivor in nodes.shards()


def test_a_killed_controller_leaves_no_shard_in_the_cluster_and_the_next_one_serves(
    service: Service, nodes: Nodes, calm: list[bytes]
) -> None:
    before, controller = nodes.shards(), service.child("controller")
    assert len(before) == 2 and controller is not None
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: not set(before) & shard_processes().keys(), 60, service)
    wait_until(lambda: service.child("controller") not in (None, controller), 120, service)
    wait_until(lambda: len(set(nodes.shards()) - set(before)) == 2 and service.is_ready(), 120, service)
    assert answers(service) == calm
    assert len(nodes.shards()) == 2


def test_a_killed_supervisor_leaves_no_shard_in_the_cluster(service: Service, nodes: Nodes) -> None:
    before = nodes.shards()
    assert len(before) == 2
    os.kill(before[0], signal.SIGSTOP)  # one that hears nothing any more
    service.process.kill()
    service.process.wait()
    wait_until(lambda: not service.processes(), 60, service)
    wait_until(lambda: not set(before) & shard_processes().keys(), 60, service)
