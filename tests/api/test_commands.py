"""The command line comes at once, says what is wrong in one line, and takes commands from other packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from api.limits import TenantLimits
from api.server import bind
from api.settings import deployment_spec, from_environment, gateway_settings, ray_auth_mode
from bench import tinyworld
from cluster.config import DeploymentSpec
from polytrace.codec import from_json, to_json
from polytrace.errors import UserError


def polytrace(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.commands", *arguments]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("POLYTRACE_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=inherited | environment, check=False)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    answer = polytrace("--help")
    assert answer.returncode == 0
    assert "serve" in answer.stdout and "status" in answer.stdout
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "api.commands", "--help"], capture_output=True, text=True, check=True
    ).stderr
    for heavy in ("torch", "ray", "fastapi", "transformers", "numpy", "httpx"):
        assert f"| {heavy}\n" not in loaded.replace(" ", "").replace("|", "| ")


def test_a_service_that_is_not_there_is_one_line() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    answer = polytrace("status", f"http://127.0.0.1:{port}")
    assert answer.returncode == 1
    assert "no answer from http://127.0.0.1" in answer.stderr and "Traceback" not in answer.stderr
    by_variable = polytrace("status", POLYTRACE_URL=f"http://127.0.0.1:{port}")
    assert by_variable.stderr == answer.stderr, "POLYTRACE_URL is --url where that is not given"


def test_a_taken_port_is_known_before_anything_is_started(tmp_path: Path) -> None:
    listener = bind("127.0.0.1", 0)
    answer = polytrace("serve", str(tmp_path), "--port", str(listener.getsockname()[1]), "--name", "m")
    listener.close()
    assert answer.returncode == 1
    assert "another --port" in answer.stderr and "Traceback" not in answer.stderr
    assert "starting" not in answer.stderr


def test_a_service_that_anybody_could_enter_is_refused_and_does_not_say_that_it_starts(tmp_path: Path) -> None:
    answer = polytrace("serve", str(tmp_path), "--port", "0", "--name", "m", "--host", "0.0.0.0")
    assert answer.returncode == 1
    assert "0.0.0.0 can be reached from other machines" in answer.stderr and "starting" not in answer.stderr


def test_a_store_serves_one_service_at_a_time(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = polytrace("serve", str(tmp_path), "--port", "0", "--name", "m", "--store", str(tmp_path / "store"))
    assert answer.returncode == 1
    assert "in use by another service" in answer.stderr


def test_a_bad_variable_is_refused_with_its_name_and_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTRACE_MAX_OPEN", "many")
    with pytest.raises(UserError, match="POLYTRACE_MAX_OPEN is 'many'"):
        gateway_settings("store")
    monkeypatch.setenv("POLYTRACE_MAX_OPEN", "0")
    with pytest.raises(UserError, match="at least 1"):
        gateway_settings("store")
    monkeypatch.setenv("POLYTRACE_MAX_OPEN", "7")
    assert gateway_settings("store").max_open == 7
    monkeypatch.setenv("RAY_AUTH_MODE", "maybe")
    with pytest.raises(UserError, match="RAY_AUTH_MODE is 'maybe'"):
        ray_auth_mode()
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert ray_auth_mode() == "token"


def test_limits_of_tenants_that_have_none_are_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway_settings("store").limits == TenantLimits()
    monkeypatch.setenv("POLYTRACE_LIMITS", '{"tokens_a_day": 5}')
    assert gateway_settings("store").limits == TenantLimits(tokens_a_day=5)
    monkeypatch.setenv("POLYTRACE_LIMITS", '{"tokens_a_day": -5}')
    with pytest.raises(UserError, match="POLYTRACE_LIMITS"):
        gateway_settings("store")


@pytest.mark.parametrize(
    ("source", "flags", "told"),
    [
        ("modl", (), "there is no folder {0}/modl, and a hub's id is owner/name; did you mean {0}/model?"),
        ("model", ("--ranks", "3"), "8 attention heads, which 3 ranks cannot share: use ranks 1, 2, 4, 8"),
        ("model", ("--stages", "9"), "8 layers, which 9 stages cannot share: use stages 1 to 8"),
    ],
)
def test_a_model_that_cannot_be_served_here_is_told_before_anything_is_started(
    source: str, flags: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    world = tinyworld.FOLDER.parent
    store = tmp_path / "store"
    answer = polytrace("serve", str(world / source), "--name", "m", "--port", "0", "--store", str(store), *flags)
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1, answer.stderr
    assert told.format(world) in answer.stderr and not store.exists()


def test_an_address_that_is_none_is_refused_before_anything_is_started() -> None:
    answer = polytrace("serve", "model", "--address", "ray://somewhere")
    assert answer.returncode == 1
    assert "HOST:PORT" in answer.stderr and "Traceback" not in answer.stderr


def test_a_variable_that_is_not_declared_cannot_be_read() -> None:
    with pytest.raises(KeyError):
        from_environment("POLYTRACE_NOSUCH", str, "")


def test_a_deployment_is_named_after_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (str(folder), "tiny"):
        spec = deployment_spec(source=source)
        assert (spec.name, spec.source) == ("tiny", str(folder)), "the service may run in another folder"
    assert deployment_spec(source="openai-community/gpt2").name == "gpt2"
    assert deployment_spec(source=str(folder), name="mine").name == "mine"
    with pytest.raises(UserError, match="--name"):
        deployment_spec(source=str(folder), name="a/b")


def test_a_deployment_that_can_be_none_anywhere_is_refused_with_its_number() -> None:
    for flags, message in (
        ({"stages": 0}, "stages is 0"),
        ({"replicas": 65}, "at most 64"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
        ({"cpus": 0.0}, "more than 0"),
    ):
        with pytest.raises(UserError, match=message):
            deployment_spec(source="a/b", **flags)


def test_a_device_map_is_a_name_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "places.json"
    file.write_text('{"vit": "cuda:1", "classifier": "cpu"}')
    assert deployment_spec(source="a/b", device_map="balanced").device_map == "balanced"
    spec = deployment_spec(source="a/b", device_map=str(file), gpus=3)
    assert (spec.device_map, spec.gpus) == ({"vit": 1, "classifier": "cpu"}, 3)
    assert from_json(DeploymentSpec, json.loads(json.dumps(to_json(spec)))) == spec
    for text, told in (
        ("[1]", "a list is no device map"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * (5 << 20), "has 5242880 bytes; a device map has at most"),
        ('{"vit": "tpu"}', "puts vit on 'tpu'"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=told):
            deployment_spec(source="a/b", device_map=str(file))
    with pytest.raises(UserError, match=r"gone\.json is neither auto, balanced, .* nor a file"):
        deployment_spec(source="a/b", device_map="gone.json")


def test_a_service_of_nothing_is_refused() -> None:
    answer = polytrace("serve")
    assert answer.returncode == 1
    assert "name a MODEL" in answer.stderr and "Traceback" not in answer.stderr
