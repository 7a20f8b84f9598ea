"""A whole service for tests, as a user starts it: `polytrace serve` of a tiny model, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from api.server import bind
from bench import tinyworld
from polytrace.graph import Graph, Invoke, Node, NodeId, Op, Port, Read, Ref, Request, Save, Site, Write
from polytrace.wire import decode_result, encode_request

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)
LAYER = 2
SCALE = 1.5
MARK = "SERVE_TEST_MARK"  # every process of a service inherits it


class Service:
    """One `polytrace serve` and what belongs to it."""

    def __init__(self, model: Path | None, folder: Path, *flags: str, **environment: str) -> None:
        self.mark = secrets.token_hex(8)
        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        listener.close()
        self.folder = folder
        self.store = folder / "store"
        what = () if model is None else (str(model), "--name", "tiny")
        command = [sys.executable, "-m", "api.commands", "serve", *what]
        command += ["--port", str(self.port), "--store", str(self.store), *flags]
        self.scratch = tempfile.mkdtemp(prefix="pt", dir="/tmp")  # a short path, as Ray's sockets need it
        environment = fresh_environment(folder) | {"POLYTRACE_KEY": "sesame"} | environment
        environment |= {MARK: self.mark, "TMPDIR": self.scratch}
        self.log = (folder / "serve.log").open("wb")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        headers = {"Authorization": "Bearer sesame"}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60)

    def is_ready(self, model: str = "tiny") -> bool:
        assert self.process.poll() is None, self.words()
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/readyz", params={"model": model}).status_code == 200
        return False

    def deployment(self, name: str = "tiny") -> dict[str, Any]:
        """What the service says of one of its deployments; empty when there is none of that name."""
        models = self.http.get("/v1/models").json()["models"]
        return next((one for one in models if one["name"] == name), {})

    def replicas(self, name: str = "tiny") -> dict[int, str]:
        """The states of a deployment's replicas, by number."""
        return {one["number"]: one["state"] for one in self.deployment(name).get("replicas", ())}

    def polytrace(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command that operates this service."""
        command = [sys.executable, "-m", "api.commands", *arguments, "--url", str(self.http.base_url)]
        environment = fresh_environment(self.folder) | {"POLYTRACE_KEY": "sesame"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)

    def processes(self) -> dict[int, str]:
        """Everything that this service started and that still lives, by process id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found

    def child(self, role: str) -> int | None:
        pids = (pid for pid, command in self.processes().items() if f"api.children {role}" in command)
        return next(pids, None)

    def shards(self, name: str | None = None) -> list[int]:
        """The processes of its shards, or of one deployment's."""
        pids = [pid for pid, command in self.processes().items() if command.startswith("ray::ShardActor")]
        return sorted(pid for pid in pids if name is None or _deployment_of(pid) == name)

    def told_for_ray(self) -> dict[str, str]:
        """What a Ray program sets to join, from the last line that says so."""
        lines = Path(self.log.name).read_text().splitlines()
        told = next(line for line in reversed(lines) if "RAY_ADDRESS=" in line)
        return dict(re.findall(r"(RAY_\w+)=(\S+)", told))

    def words(self) -> str:
        own = (Path(self.log.name), *self.store.glob("*.log"))
        logs = {log.name: log.read_text(errors="replace") for log in own if log.exists()}
        for log in Path(self.scratch).glob("**/logs/worker-*.err"):
            told = log.read_text(errors="replace")
            if any(word in told for word in ("Fatal", "terminate called", "Check failed")):  # a process that crashed
                logs[log.name] = told
        return "\n".join(f"{name}: {told[-3000:]}" for name, told in logs.items())

    def kill_all(self) -> None:
        self.http.close()
        self.log.close()
        self.process.kill()  # does nothing once it was waited for: its number may be somebody else's thread by now
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _deployment_of(shard: int) -> str | None:
    with contextlib.suppress(OSError):
        found = re.search(rb"(?:^|\0)POLYTRACE_SHARD=(\S+) ", (Path("/proc") / str(shard) / "environ").read_bytes())
        return found[1].decode() if found else None
    return None


def make_model(folder: Path) -> Path:
    """A seeded random Llama with four layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ ' is' if add_generation_prompt }}"


def make_chat_world(folder: Path) -> Path:
    """tinyworld with a chat template."""
    shutil.copytree(tinyworld.FOLDER, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return folder


def answer(service: Service, layer: int, prompt: tuple[int, ...], name: str = "tiny") -> bytes:
    """The saved values of a request, through HTTP, however long it takes."""
    posted = service.http.post(f"/v1/models/{name}/requests", content=body(layer, prompt, SCALE)).json()
    assert "id" in posted, posted
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        status = service.http.get(f"/v1/requests/{posted['id']}", params={"wait": 30}).json()
        if status["state"] == "done":
            values, _ = decode_result(service.http.get(status["result"]).content)
            return bytes(values["out"].data)
        assert status["state"] in ("queued", "running"), status
    raise AssertionError(f"no answer: {status}")


def fresh_environment(folder: Path) -> dict[str, str]:
    """As on a machine where Ray has never run: an empty home folder, and nothing set for Ray."""
    (folder / "home").mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"HOME": str(folder / "home")}


def body(layer: int = LAYER, prompt: tuple[int, ...] = PROMPT, scale: float | None = None) -> bytes:
    """Saves a layer's output; with a scale, the first layer's is multiplied by it."""
    where = "experiment.py:1"
    site, first = (Site(module=f"model.layers.{number}", port=Port.OUTPUT) for number in (layer, 0))
    nodes: tuple[Node, ...] = ()
    if scale is not None:
        nodes = (
            Read(site=first, invoke=0, where=where),
            Op(name="mul", args=(Ref(NodeId(0)), scale), where=where),
            Write(site=first, invoke=0, value=Ref(NodeId(1)), in_place=True, where=where),
        )
    read = NodeId(len(nodes))
    nodes += (Read(site=site, invoke=0, where=where), Save(name="out", value=Ref(read), where=where))
    request = Request(graph=Graph(nodes=nodes), invokes=(Invoke(sequences=(prompt,)),), constants={})
    return b"".join(encode_request(request))


def wait_until(condition: object, timeout_s: float, service: Service | Guest) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen in {timeout_s} s\n{service.words()}"
        time.sleep(0.2)


class Guest:
    """A model on a service that others use too, with as much of `Service` as those need who break nothing."""

    def __init__(self, url: str, model: Path, *, name: str = "tiny", key: str = "sesame", **wish: Any) -> None:
        self.http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
        self.port = self.http.base_url.port
        self._others = self._models().keys()
        self.http.put(f"/v1/models/{name}", json={"source": str(model), "cpus": 0.1} | wish).raise_for_status()

    def is_ready(self, model: str = "tiny") -> bool:
        return self.http.get("/readyz", params={"model": model}).status_code == 200

    def words(self) -> str:
        return json.dumps(self._models(), indent=1)

    def kill_all(self) -> None:
        """Takes away what was deployed since it came."""
        for name in self._models().keys() - self._others:
            self.http.delete(f"/v1/models/{name}", params={"now": "true"}).raise_for_status()
        wait_until(lambda: self._models().keys() <= self._others, 60, self)
        self.http.close()

    def _models(self) -> dict[str, Any]:
        return {one["name"]: one for one in self.http.get("/v1/models").json()["models"]}
