"""What stands in deploy/: each file against the schema, or the program, of who reads it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from typer.main import get_command

from api.commands import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERAY = json.loads(Path(__file__).with_name("kuberay.json").read_text())


def test_the_manifests_are_what_kuberays_crds_take() -> None:
    for file in DEPLOY.glob("kuberay/*.yaml"):
        manifest = yaml.safe_load(file.read_text())
        jsonschema.validate(manifest, schema_of(manifest["kind"]))
        assert not unknown_fields(manifest, schema_of(manifest["kind"])), "the API server would drop these"


def test_a_wrong_manifest_is_found() -> None:
    manifest = yaml.safe_load((DEPLOY / "kuberay/raycluster.yaml").read_text())
    schema = schema_of("RayCluster")
    manifest["spec"]["headGroupSpec"]["templat"] = manifest["spec"]["headGroupSpec"].pop("template")
    assert unknown_fields(manifest, schema) == ["spec.headGroupSpec.templat"]
    with pytest.raises(jsonschema.ValidationError, match="'template' is a required property"):
        jsonschema.validate(manifest, schema)


def test_the_cluster_launchers_file_is_what_its_schema_takes() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((DEPLOY / "cluster-launcher/polytrace.yaml").read_text()), schema)


def test_every_flag_of_polytrace_that_a_deploy_file_says_is_one() -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {flag for one in serve.params for flag in one.opts}
    said = 0
    for file in (file for file in DEPLOY.glob("**/*") if file.is_file()):
        text = re.sub(r"\\\n", " ", file.read_text())
        for command in re.findall(r"polytrace serve ([^#]*?)(?:&|\n\S|\n\n|>)", text):
            assert set(re.findall(r"--[a-z-]+", command)) <= known, (file, command)
            said += 1
    assert said >= 4


def test_shell_scripts_parse_those_in_manifests_too() -> None:
    manifest = yaml.safe_load((DEPLOY / "kuberay/raycluster.yaml").read_text())
    head = manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["args"][0]
    launcher = yaml.safe_load((DEPLOY / "cluster-launcher/polytrace.yaml").read_text())
    for script in (head, *launcher["head_start_ray_commands"], (DEPLOY / "slurm/polytrace.sbatch").read_text()):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_unit_is_one_to_systemd(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd/polytrace.service").read_text()
    unit = tmp_path / "polytrace.service"  # the same with a program and a user that are here
    unit.write_text(text.replace("/opt/polytrace/bin/polytrace", sys.executable).replace("User=polytrace", "User=root"))
    told = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert told.returncode == 0 and "polytrace.service" not in told.stderr, told.stderr
    for line in (DEPLOY / "systemd/polytrace.env").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Z_]+=.*", line), line


def test_the_image_copies_what_the_package_is_made_of() -> None:
    lines = (DEPLOY / "Containerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    assert all((ROOT / name).exists() for name in copied)
    assert copied >= {"pyproject.toml", "polytrace", "scheduling", "engine", "cluster", "api", "bench"}
    extras = re.search(r"'\.\[(.*?)\]'", "\n".join(lines))
    assert extras is not None
    assert all(re.search(rf"(?m)^{one} = \[", (ROOT / "pyproject.toml").read_text()) for one in extras[1].split(","))


def test_the_slurm_script_starts_ray_on_each_node_and_the_service_with_secrets_in_files_alone(tmp_path: Path) -> None:
    """Slurm's commands are stand-ins that run or note what they are told; Ray and the service's start are noted too."""
    tools = tmp_path / "tools"
    tools.mkdir()
    tool = f'#!{shutil.which("bash")}\necho "$(basename "$0") $*" >> {shlex.quote(str(tmp_path / "said"))}\n'
    with socket.create_server(("127.0.0.1", 0)) as head:  # what the script waits for
        bodies = {
            "scontrol": "printf 'node1\\nnode2\\n'",
            "srun": 'while [ "$1" != hostname ] && [ "$1" != ray ]; do shift; done; exec "$@"',
            "hostname": "echo 127.0.0.1",
            "ray": f"echo $$ >> {tmp_path}/pids; exec sleep 60",
            # not before both nodes have theirs: they are started beside it
            "polytrace": f"until [ $(cat {tmp_path}/pids | wc -l) = 2 ]; do sleep 0.05; done; "
            f"echo $POLYTRACE_KEY $RAY_AUTH_MODE > {tmp_path}/told; exit 3",
        }
        for name, body in bodies.items():
            (tools / name).write_text(f"{tool}{body}\n")
            (tools / name).chmod(0o755)
        store = tmp_path / "store"
        environment = os.environ | {
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "POLYTRACE_MODEL": "model",
            "POLYTRACE_FLAGS": "--stages 2",
            "POLYTRACE_STORE": str(store),
            "POLYTRACE_RAY_PORT": str(head.getsockname()[1]),
        }
        script = ["bash", str(DEPLOY / "slurm/polytrace.sbatch")]
        ran = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert ran.returncode == 3, ran.stderr  # the service's own code
    said = (tmp_path / "said").read_text()
    address = f"127.0.0.1:{environment['POLYTRACE_RAY_PORT']}"
    assert re.search(r"^ray start --block .*--head", said, re.M) and f"--address {address}" in said
    assert re.search(rf"^polytrace serve model --stages 2 --address {address} --host 0\.0\.0\.0", said, re.M)
    secrets = [(store / name).read_text() for name in ("ray_token", "operator_key")]
    assert (tmp_path / "told").read_text().split() == [secrets[1], "token"]
    assert all(len(one) == 64 and one not in said + ran.stdout + ran.stderr for one in secrets)
    assert all((store / name).stat().st_mode & 0o077 == 0 for name in ("ray_token", "operator_key"))
    for pid in (tmp_path / "pids").read_text().split():  # the nodes' Rays ended with the script
        assert not Path(f"/proc/{pid}").exists()


def schema_of(kind: str) -> dict[str, Any]:
    return KUBERAY["kinds"][kind] | {"$defs": KUBERAY["$defs"]}


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Fields that a CRD's schema does not name: JSON schema lets them be, Kubernetes drops them."""
    if "$ref" in schema:
        schema = KUBERAY["$defs"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, list):
        return [name for one in value for name in unknown_fields(one, schema.get("items", {}), path)]
    fields = schema.get("properties")
    if not isinstance(value, dict) or fields is None:
        return []
    found = []
    for name, one in value.items():
        where = f"{path}.{name}".lstrip(".")
        found += [where] if name not in fields else unknown_fields(one, fields[name], where)
    return found
