"""NDIF's services as one family of processes: `python -m bench.load.ndif.services PYTHON FOLDER MODEL`.

Redis, an object store, Ray with NDIF's controller, and the API, all on ports of their own. Says "ready URL" on the
standard output when the model is deployed, and ends all of them when its standard input closes. `ndif stop` would end
every Ray on the machine, so it is not used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from api.processes import adopt_orphans, end_descendants
from bench.environments import Environment, NoPeerError
from bench.service import free_port

NDIF = Environment(
    package="ndif",
    version="0.1.2",
    extras="api,ray",
    others=("accelerate", "nnsight==0.8.1"),
    transformers="5.15.0",  # nnsight 0.8.1 cannot name tasks of newer ones
    interpreters=("python3.12", "python3.13"),
)
NAME = "polytrace/tinyworld"  # a name on the hub, as a model key needs one
_REVISION = "0" * 40
_START_S = 240.0


@contextlib.contextmanager
def running_ndif(python: Path, folder: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Its URL, and the environment that a client needs to find the model by name."""
    with tempfile.TemporaryDirectory(prefix="ndif-", dir="/tmp") as scratch:
        command = [sys.executable, "-m", "bench.load.ndif.services", str(python), scratch, str(folder)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        try:
            said = process.stdout.readline().split()
            if len(said) != 2 or said[0] != "ready":
                logs = "\n".join(path.read_text(errors="replace")[-1500:] for path in Path(scratch).glob("*.log"))
                raise NoPeerError(f"NDIF did not start:\n{logs}")
            yield said[1], environment(python, Path(scratch))
        finally:
            process.stdin.close()
            process.wait()


def environment(python: Path, scratch: Path) -> dict[str, str]:
    """What a process of the peer has of an environment."""
    on_cpu = str(Path(__file__).parent / "on_cpu")
    return {
        "PATH": f"{scratch / 'bin'}:{python.parent}:{os.environ['PATH']}",
        "HOME": str(scratch),
        "HF_HOME": str(scratch / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if shutil.which("nvidia-smi") else {"NDIF_ON_CPU": "1", "PYTHONPATH": on_cpu}),
    }


def put_on_hub(folder: Path, scratch: Path) -> None:
    """The model as the hub's client would have put it into its cache."""
    place = scratch / "hub" / "hub" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / _REVISION)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(_REVISION)


def serve(python: Path, scratch: Path, folder: Path) -> None:
    """Until the standard input closes."""
    adopt_orphans()
    ports = {
        name: free_port() for name in ("redis", "objects", "api", "head", "client", "dashboard", "manager", "metrics")
    }
    put_on_hub(folder, scratch)
    _wrap_ray(python, scratch, ports["client"])
    url = f"http://localhost:{ports['api']}"
    env = environment(python, scratch) | {
        "NDIF_HOME": str(scratch),
        "NDIF_REDIS_URL": f"redis://localhost:{ports['redis']}",
        "NDIF_OBJECT_STORE_URL": f"http://localhost:{ports['objects']}",
        "NDIF_API_URL": url,
        "NDIF_API_PORT": str(ports["api"]),
        "NDIF_RAY_ADDRESS": f"ray://localhost:{ports['client']}",
        "NDIF_RAY_HEAD_PORT": str(ports["head"]),
        "NDIF_RAY_DASHBOARD_PORT": str(ports["dashboard"]),
        "NDIF_RAY_OBJECT_MANAGER_PORT": str(ports["manager"]),
        "NDIF_RAY_METRICS_PORT": str(ports["metrics"]),
        "NDIF_RAY_TEMP_DIR": str(scratch / "ray"),
    }
    services = _site_packages(python) / "ndif" / "services"
    commands = {
        "redis": ["redis-server", "--port", str(ports["redis"]), "--save", ""],
        "objects": [sys.executable, "-m", "moto.server", "-p", str(ports["objects"])],
        "ray": ["bash", str(services / "ray" / "start.sh")],
        "api": ["bash", str(services / "api" / "start.sh")],
    }
    try:
        for name, command in commands.items():
            own = dict(os.environ) if name == "objects" else env
            with (scratch / f"{name}.log").open("w") as log:
                subprocess.Popen(command, env=own, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=scratch)
        _deploy(python, env, scratch, url)
        print(f"ready {url}", flush=True)
        sys.stdin.read()
    finally:
        end_descendants(0.0)


def _deploy(python: Path, env: Mapping[str, str], scratch: Path, url: str) -> None:
    deadline = time.monotonic() + _START_S
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{url}/connected").status_code == 200:
                    break
            time.sleep(0.5)
    command = [str(python.parent / "ndif"), "deploy", NAME, "--task", "text-generation", "--dtype", "float32"]
    with (scratch / "deploy.log").open("w") as log:
        subprocess.run(command, env=env, stdout=log, stderr=log, check=True, timeout=_START_S, cwd=scratch)


def _wrap_ray(python: Path, scratch: Path, client_port: int) -> None:
    """The start script has no words for the port of Ray's clients, nor for a machine that is to have a GPU."""
    more = f"--ray-client-server-port={client_port} --num-cpus=8"
    if not shutil.which("nvidia-smi"):
        more += " --num-gpus=1"
    script = scratch / "bin" / "ray"
    script.parent.mkdir()
    script.write_text(
        f'#!/bin/bash\nif [ "$1" = start ]; then more="{more}"; fi\nexec {python.parent}/ray "$@" $more\n'
    )
    script.chmod(0o755)


def _site_packages(python: Path) -> Path:
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    serve(*map(Path, sys.argv[1:4]))
