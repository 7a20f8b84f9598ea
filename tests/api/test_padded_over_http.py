"""A hybrid that the gate does not let pack, served on a Ray cluster: the same results as in this process.

In float32, max|a - b| <= 1e-5 max(1, max|b|).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from padded_families import model_of
from services import Guest, wait_until
from small import close

import polytrace
from bench.service import Service as Running

PROMPTS = [[3, 14, 15, 92, 65], [35, 89, 79, 32, 38, 46, 26, 43]]


def test_a_service_gives_a_hybrids_values_as_one_process_does(tmp_path: Path, world_service: Running) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "model"
    model_of("falcon_h1").save_pretrained(folder)
    service = Guest(world_service.url, folder)
    try:
        with polytrace.load(str(folder), threads=1) as here:
            expected = values(here)
        wait_until(service.is_ready, 240, service)
        served = polytrace.connect(f"http://127.0.0.1:{service.port}", "tiny", key="sesame")
        found = values(served)
    finally:
        service.kill_all()
    for ours, theirs in zip(found, expected, strict=True):  # shards may have another number of threads
        close(ours, theirs)
    assert not torch.allclose(found[0][:, -1], found[1], atol=1e-3), "the edit matters"


def values(model: Any) -> list[torch.Tensor]:
    """Of a trace in which a value goes from one prompt to another, and a pattern."""
    with model.trace() as tracer:
        with tracer.invoke(PROMPTS):
            state = model.model.layers[1].mamba.output[:, -1].mean(0)
            saved = [model.lm_head.output.save()]
        with tracer.invoke(PROMPTS):
            model.model.layers[2].mamba.output[:, -1] = state
            saved.append(model.lm_head.output[:, -1].save())
            saved.append(model.model.layers[3].pattern[:, :, -1].save())
    return saved
