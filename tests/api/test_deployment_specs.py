"""A deployment that is asked for by HTTP, by flags or in Python is the same where nothing is said of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import typer
from typer.testing import CliRunner

from api.deployment_flags import DeploymentFlags, takes_deployment
from api.deployment_routes import Deploy
from cluster.config import DeploymentSpec, ShareAcross

PLAIN = DeploymentSpec(name="x", source="x")
ELSE: dict[str, Any] = {
    "stages": 2,
    "ranks": 2,
    "replicas": 3,
    "dtype": "bfloat16",
    "device": "cpu",
    "cpus": 0.5,
    "random_weights_seed": 7,
    "offload_bytes": 1 << 30,
    "share_across": ShareAcross.DEPLOYMENT,
    "merges_calls": False,
    "whole": False,
}  # of each field another value than PLAIN's; a device map and its GPUs are apart: they exclude some of these
MAPPED = {"device_map": "balanced", "gpus": 2}


def test_what_is_not_named_is_the_same_by_http_and_by_flags() -> None:
    assert DeploymentSpec(name="x", **Deploy(source="x").model_dump()) == PLAIN
    assert DeploymentFlags().spec("x") == by_flags() == PLAIN
    assert set(Deploy.model_fields) == {field.name for field in fields(DeploymentSpec)} - {"name"}


def test_what_is_named_comes_over_by_http_and_by_flags() -> None:
    assert set(ELSE) | set(MAPPED) == set(Deploy.model_fields) - {"source"}
    flags = "--stages 2 --ranks 2 --replicas 3 --dtype bfloat16 --device cpu --cpus 0.5 --random-weights 7 --offload 1 "
    flags += "--share-across deployment --no-merge-calls --packed"
    for wish, given in ((ELSE, flags), (MAPPED, "--device-map balanced --gpus 2")):
        spec = DeploymentSpec(name="x", source="x", **wish)
        assert all(getattr(spec, name) != getattr(PLAIN, name) for name in wish)
        assert DeploymentSpec(name="x", **Deploy(source="x", **wish).model_dump()) == spec
        assert by_flags(*given.split()) == spec


def by_flags(*given: str) -> DeploymentSpec:
    """As a command that `takes_deployment` reads them."""
    specs: list[DeploymentSpec] = []
    app = typer.Typer()

    @app.command()
    @takes_deployment
    def command(deployment: DeploymentFlags) -> None:
        specs.append(deployment.spec("x"))

    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    return specs.pop()
