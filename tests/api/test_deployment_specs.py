"""A deployment that is asked for by HTTP, by flags or in Python is the same where nothing is said of it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from api.deployment_flags import DeploymentFlags, takes_deployment
from api.deployment_routes import Deploy
from api.operations import put
from api.service_calls import Entry, Service
from cluster.config import DeploymentSpec, ShareAcross
from polytrace.codec import to_json
from polytrace.errors import UserError

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
    known = DeploymentSpec(name="x", source="x", **(ELSE | {"random_weights_seed": None}))
    assert by_flags(known=known) == known
    assert by_flags("--stages", "1", "--offload", "0", "--merge-calls", known=known) == replace(
        known, stages=1, offload_bytes=0, merges_calls=True
    ), "a default that is written is meant"
    mapped = DeploymentSpec(name="x", source="x", **MAPPED)
    assert by_flags("--gpus", "3", known=mapped) == replace(mapped, gpus=3)
    taken_back = by_flags("--gpus", "none", "--device-map", "none", known=mapped)
    assert taken_back == PLAIN and by_flags("--cpus", "none", known=replace(PLAIN, cpus=2.0)) == PLAIN


def test_random_weights_are_never_kept_but_said_again_or_taken_back() -> None:
    known = replace(PLAIN, random_weights_seed=7, stages=4)
    with pytest.raises(UserError, match=r"--random-weights 7 .* --random-weights none"):
        by_flags(known=known)
    assert by_flags("--random-weights", "7", known=known) == known
    assert by_flags("--random-weights", "none", known=known) == replace(known, random_weights_seed=None)


class Knowing(Service):
    """A service that has one deployment, and what it is asked for."""

    def __init__(self, spec: DeploymentSpec | None, **facts: Any) -> None:
        super().__init__("http://127.0.0.1:9", None)
        plain = {"state": "ready", "mode": "serving", "is_described": True}
        self.known: list[Entry] = [] if spec is None else [{"name": spec.name, "spec": to_json(spec)} | plain | facts]
        self.asked: list[DeploymentSpec] = []

    def deployments(self) -> list[Entry]:
        return self.known

    def ask(self, method: str, path: str, **more: Any) -> None:
        assert method == "PUT"
        self.asked.append(DeploymentSpec(name=path.rpartition("/")[2], **more["json"]))

    def put(self, model: str, *given: str) -> DeploymentSpec:
        put(self, flags_of(*given), model, wait=False)
        return self.asked.pop()


def test_a_trial_that_failed_leaves_nothing_to_the_source_that_is_said_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trial = DeploymentSpec(name="m", source="org/m", random_weights_seed=7, stages=4)
    failed = Knowing(trial, state="failed", is_described=False)
    assert failed.put("org/m", "--name", "m") == DeploymentSpec(name="m", source="org/m")
    with pytest.raises(UserError, match="m has random weights"):
        failed.put("m")
    with pytest.raises(UserError, match="m has random weights"):
        Knowing(trial, state="failed").put("org/m", "--name", "m")
    capsys.readouterr()
    served = replace(trial, random_weights_seed=None, offload_bytes=1 << 29, device="cpu")
    assert Knowing(served).put("org/m", "--name", "m") == served
    assert "it keeps stages 4, device cpu, offload 0.5 GiB\n" in capsys.readouterr().err, "what nobody said is told"


def test_a_known_name_is_the_deployment_whatever_folder_is_here_and_its_source_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = DeploymentSpec(name="gpt2", source="/models/finetuned", stages=4)
    assert Knowing(known).put("gpt2") == known
    assert capsys.readouterr().err.startswith("deploying gpt2 (/models/finetuned) on 1 x 4 x 1 shards")
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Knowing(known).put("gpt2") == known, "it has it serve as it is, as the service says"
    assert "a deployment here, of /models/finetuned, and that is meant" in capsys.readouterr().err
    of_hub = replace(known, source="gpt2")
    assert Knowing(of_hub).put("gpt2") == of_hub, "nor is a hub's id another folder in another place"
    here = str((tmp_path / "gpt2").resolve())
    assert Knowing(known).put("gpt2", "--name", "gpt2").source == here, "a source with a name is a source"
    assert Knowing(None).put("gpt2") == DeploymentSpec(name="gpt2", source=here)


def by_flags(*given: str, known: DeploymentSpec | None = None) -> DeploymentSpec:
    """As a command that `takes_deployment` reads them, of one that is there where it is `known`."""
    return flags_of(*given).spec("x", known)


def flags_of(*given: str) -> DeploymentFlags:
    found: list[DeploymentFlags] = []
    app = typer.Typer()

    @app.command()
    @takes_deployment
    def command(deployment: DeploymentFlags) -> None:
        found.append(deployment)

    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    return found.pop()
