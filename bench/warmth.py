"""How long a deployment that rests takes until it is ready again: cold against warm, on a service of its own.

    python -m bench.warmth [--quick]

A Llama with random weights is written to a temporary folder and deployed on demand. In each turn it is evicted and
loaded: *warm*, its files were held in memory; *cold*, the kernel was told that nobody needs them (posix_fadvise; what
lies below the kernel may cache still). Times are from the wish to `ready`, as `polytrace models load` waits for it, and
of them what the shards themselves say of reading.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from api.server import bind
from bench import record
from bench.loading import LoadingConfig, write_model


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmthConfig:
    """One run of the benchmark."""

    layers: int = 12
    hidden: int = 2560
    vocabulary: int = 32000
    dtype: str = "bfloat16"
    rounds: int = 3


def run(config: WarmthConfig) -> dict[str, Any]:
    """The figures, as plain JSON."""
    with tempfile.TemporaryDirectory(prefix="polytrace-warmth-") as folder:
        model = Path(folder) / "model"
        write_model(
            LoadingConfig(layers=config.layers, hidden=config.hidden, vocabulary=config.vocabulary, dtype=config.dtype),
            str(model),
        )
        files = sorted(model.glob("*.safetensors"))
        with _service(Path(folder)) as http:
            _ask(http, "PUT", "", json={"source": str(model)})
            _ask(http, "PATCH", "/keeping", json={"on_demand": True})
            _until(http, "ready")
            seconds: dict[str, list[float]] = {"cold": [], "warm": []}
            held = ""
            for _ in range(config.rounds):
                for heat in seconds:
                    _ask(http, "POST", "/evict", json={"to": heat})
                    told = _until(http, heat)
                    if heat == "warm":
                        held = told.rpartition("; ")[2]
                    else:
                        _forget(files)
                    began = time.perf_counter()
                    _ask(http, "POST", "/load")
                    _until(http, "ready")
                    seconds[heat].append(time.perf_counter() - began)
        return {
            "weight_bytes": sum(file.stat().st_size for file in files),
            "seconds": {heat: {"median": statistics.median(times), "all": times} for heat, times in seconds.items()},
            "held": held,
        }


def _forget(files: list[Path]) -> None:
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def _service(folder: Path) -> Iterator[httpx.Client]:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    command = [sys.executable, "-m", "api.commands", "serve", "--without-keys", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--store", str(folder / "store")], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            while True:
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()[-2000:])
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/healthz").status_code == 200:
                        break
                time.sleep(0.2)
            yield http
    finally:
        process.terminate()
        process.wait()


def _ask(http: httpx.Client, method: str, path: str, **more: Any) -> None:
    http.request(method, f"/v1/models/m{path}", **more).raise_for_status()


def _until(http: httpx.Client, state: str) -> str:
    """What is said of the deployment when it is so."""
    while True:
        (known,) = http.get("/v1/models").json()["models"]
        if known["state"] == state:
            return str(known["progress"])
        if known["state"] == "failed":
            raise RuntimeError(known["progress"])
        time.sleep(0.05)


def tell(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    cold, warm = (figures["seconds"][heat] for heat in ("cold", "warm"))
    times = f"ready after {cold['median']:.1f} s from cold, {warm['median']:.1f} s from warm"
    return f"{figures['weight_bytes'] / 1e9:.2f} GB of weights: {times} (warm: {figures['held']})"


def main() -> None:
    """The command line."""
    is_quick = "--quick" in sys.argv[1:]
    config = WarmthConfig(layers=2, hidden=256, rounds=1) if is_quick else WarmthConfig()
    figures = run(config)
    print(tell(figures))
    if not is_quick:
        record.append("warmth", config=asdict(config), figures=figures)


if __name__ == "__main__":
    main()
