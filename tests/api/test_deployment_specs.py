"""A deployment that is asked for by HTTP, by flags or in Python is the same where nothing is said of it."""

from __future__ import annotations

from dataclasses import fields, replace
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


def test_what_is_not_given_stays_as_it_is_of_one_that_is_there() -> None:
    known = DeploymentSpec(name="x", source="x", **ELSE)
    assert by_flags(known=known) == known
    assert by_flags("--stages", "1", "--offload", "0", "--merge-calls", known=known) == replace(
        known, stages=1, offload_bytes=0, merges_calls=True
    ), "a default that is written is meant"
    mapped = DeploymentSpec(name="x", source="x", **MAPPED)
    assert by_flags("--gpus", "3", known=mapped) == replace(mapped, gpus=3)


def by_flags(*given: str, known: DeploymentSpec | None = None) -> DeploymentSpec:
    """As a command that `takes_deployment` reads them, of one that is there where it is `known`."""
    specs: list[DeploymentSpec] = []
    app = typer.Typer()

    @app.command()
    @takes_deployment
    def command(deployment: DeploymentFlags) -> None:
        specs.append(deployment.spec("x", known))

    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    return specs.pop()
