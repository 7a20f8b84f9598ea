"""A map into an object store: S3 as moto serves it. Skipped where moto's server and s3fs are not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import polytrace
from bench.tinyworld import FOLDER

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7]] * 8


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A store with one bucket, which whoever opens `s3://` finds through the environment."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    store = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}")
    store.mkdir("bucket")
    yield store
    server.stop()


def test_a_map_into_an_object_store_leaves_the_bytes_that_it_leaves_in_a_folder(bucket: Any, tmp_path: Path) -> None:
    model = polytrace.load(str(FOLDER), threads=1)

    def body() -> dict[str, Any]:
        last = model.model.layers[1].output[0][:, -1]
        return {"last": last, "mean": polytrace.mean(last)}

    there, here = (model.map(PROMPTS, body, to=to).run() for to in ("s3://bucket/act", tmp_path))
    assert torch.equal(there["mean"], here["mean"])
    for name in os.listdir(tmp_path):
        assert bucket.cat(f"bucket/act/{name}") == (tmp_path / name).read_bytes(), name
    again = model.map(PROMPTS, body, to="s3://bucket/act")
    assert [part.path for part in again] == ["s3://bucket/act/part-00000.safetensors"], (
        "it goes on behind what is there"
    )
