"""A map's folder: what is in it, and that a run which was cut off goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import polytrace
from engine.local import LocalBackend
from polytrace.errors import ConflictError, GraphError, RunError
from polytrace.model import Model
from scheduling.policy import PassPolicy

PROMPTS = [[(number * 7 + place) % 64 for place in range(2 + number % 9)] for number in range(40)]


def make_model(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"), 0)


@pytest.fixture(scope="module")
def model(weights: Path) -> Iterator[Model]:
    backend = LocalBackend(str(weights), threads=1, policy=PassPolicy(budget_tokens=64, least_tokens=16))
    yield Model(backend)
    backend.close()


def body_of(model: Model) -> Any:
    def body() -> Any:
        layer = model.model.layers[0].output[0]
        last = layer[:, -1]
        return {
            "last": last,
            "all": layer,
            "pattern": model.model.layers[1].self_attn.pattern,
            "mean": polytrace.mean(last),
            "covariance": polytrace.covariance(last),
            "best": polytrace.top_k(last, 3),
        }

    return body


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def finished(model: Model, folder: Any) -> Any:
    mapping = model.map(PROMPTS, body_of(model), to=folder)
    mapping.run()
    return mapping.results


def same(one: Any, two: Any) -> bool:
    return all(
        torch.equal(a, b)
        for name in one
        for a, b in (zip(one[name], two[name], strict=True) if name == "best" else [(one[name], two[name])])
    )


def test_a_folder_has_numbered_parts_and_an_index(model: Model, tmp_path: Path) -> None:
    parts = list(model.map(PROMPTS, body_of(model), to=tmp_path / "map"))
    files = files_of(tmp_path / "map")
    assert list(files) == [
        "combined.safetensors",
        "index.json",
        *(f"part-{n:05}.safetensors" for n in range(len(parts))),
    ]
    index = json.loads(files["index.json"])
    assert index["is_complete"] and len(index["parts"]) == len(parts) > 3
    ends = [entry["prompts"] for entry in index["parts"]]
    assert ends[0][0] == 0 and ends[-1][1] == 40 and all(one[1] == two[0] for one, two in pairwise(ends))
    for part, entry in zip(parts, index["parts"], strict=True):
        data = files[entry["file"]]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
        stored = load_file(tmp_path / "map" / entry["file"])  # any reader of safetensors reads it
        assert torch.equal(stored["last"], part["last"])
        assert stored["all:lengths"].tolist() == [len(PROMPTS[number]) for number in part.numbers]
        assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
            name: shape for name, (_, shape) in entry["tensors"].items()
        }
    assert set(load_file(tmp_path / "map" / "combined.safetensors")) == {
        *("mean", "covariance", "best.values", "best.prompts", "best.positions")
    }


def test_a_run_that_was_left_goes_on_behind_its_last_part(model: Model, tmp_path: Path) -> None:
    whole = finished(model, tmp_path / "whole")
    began = iter(model.map(PROMPTS, body_of(model), to=tmp_path / "map"))
    next(began), next(began)
    began.close()  # type: ignore[attr-defined]
    assert not json.loads((tmp_path / "map" / "index.json").read_bytes())["is_complete"]
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "map").glob("part-*")}
    assert len(before) == 2
    mapping = model.map(PROMPTS, body_of(model), to=tmp_path / "map")
    rows = [row for part in mapping for row in part.rows("all")]
    assert len(rows) == 40, "parts of the earlier run are handed out too"
    assert same(mapping.results, whole)
    assert files_of(tmp_path / "map") == files_of(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "map").glob("part-*")}
    assert before.items() <= after.items(), "what was there was not written again"


@pytest.mark.parametrize("harm", ["cut", "changed", "gone"])
def test_a_damaged_part_is_made_again(model: Model, tmp_path: Path, harm: str) -> None:
    whole = finished(model, tmp_path)
    files = files_of(tmp_path)
    victim = tmp_path / "part-00001.safetensors"
    data = files[victim.name]
    if harm == "gone":
        victim.unlink()
    else:
        victim.write_bytes(data[:-3] if harm == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    assert same(finished(model, tmp_path), whole)
    assert files_of(tmp_path) == files


def test_a_finished_map_runs_nothing(model: Model, tmp_path: Path) -> None:
    whole = finished(model, tmp_path)
    inner, requests = model.backend, []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def run(self, request: Any, tell: Any = None) -> Any:
            requests.append(request)
            return inner.run(request)

    counted = Model(Counted())  # type: ignore[arg-type]
    assert same(finished(counted, tmp_path), whole)
    assert len(requests) == 1 and len(requests[0].invokes) == 1  # whether the model gives the numbers that it gave


def test_another_map_is_refused_with_what_differs(model: Model, tmp_path: Path, tmp_path_factory: Any) -> None:
    finished(model, tmp_path / "map")
    files = files_of(tmp_path / "map")

    def refused(words: str, *, model: Model = model, prompts: Any = PROMPTS, body: Any = None, **more: Any) -> None:
        with pytest.raises(ConflictError, match=words):
            model.map(prompts, body or body_of(model), to=tmp_path / "map", **more).run()

    refused("the body", body=lambda: {"last": model.model.layers[0].output[0][:, -1]})
    refused("the seed", seed=1)
    refused("the first prompt", prompts=[[5, 5], *PROMPTS[1:]])
    refused("other prompts than", prompts=[*PROMPTS[:10], [1, 1, 1], *PROMPTS[11:]])
    refused("this dataset ends after 30", prompts=PROMPTS[:30])
    refused("complete with 40 prompts, and this dataset has more", prompts=[*PROMPTS, [1, 2]])
    other = make_model(tmp_path_factory.mktemp("other"), 1)
    policy = PassPolicy(budget_tokens=64, least_tokens=16)
    with Model(LocalBackend(str(other), threads=1, policy=policy)) as tuned:  # one shape, other weights
        refused("the numbers that the model gives", model=tuned)
    assert files_of(tmp_path / "map") == files
    (tmp_path / "map" / "index.json").write_text("{}")
    refused("not the index of a map")


def test_other_lines_are_the_same_map(model: Model, tmp_path: Path) -> None:
    def one() -> Any:
        return {"x": model.model.layers[0].output[0][:, -1] * 2}

    def two() -> Any:
        value = model.model.layers[0].output[0]
        return {"x": value[:, -1] * 2}

    model.map(PROMPTS, one, to=tmp_path).run()
    model.map(PROMPTS, two, to=tmp_path).run()


def test_a_first_prompt_that_fails_while_it_runs_is_left_out_of_a_folder_too(model: Model, tmp_path: Path) -> None:
    def body() -> Any:
        return {"x": torch.arange(8.0)[model.model.embed_tokens.input[:, -1]]}

    prompts = [[1, 60], [1, 2], [1, 3]]
    with pytest.raises(RunError, match="prompt 0: "):
        model.map(prompts, body, to=tmp_path).run()
    for _ in range(2):
        mapping = model.map(prompts, body, to=tmp_path, on_error="skip")
        (part,) = mapping
        assert part["x"].tolist() == [2.0, 3.0] and list(mapping.skipped) == [0]


def test_a_body_that_mixes_prompts_has_one_part(model: Model, tmp_path: Path) -> None:
    body = lambda: {"x": model.model.layers[0].output[0][:, -1].softmax(0)}  # noqa: E731
    (first,) = model.map(PROMPTS[:5], body, to=tmp_path)
    (again,) = model.map(PROMPTS[:5], body, to=tmp_path)
    assert torch.equal(first["x"], again["x"]) and first["x"].shape == (5, 16)
    with pytest.raises(ConflictError, match="the prompts"):
        model.map([*PROMPTS[:4], [9, 9]], body, to=tmp_path).run()


def test_a_sweep_goes_on_in_its_folder_and_knows_its_items(model: Model, tmp_path: Path) -> None:
    def body(scale: float) -> Any:
        model.model.layers[0].output[0][:, -1] *= scale
        return {"logits": model.lm_head.output[:, -1]}

    scales = [1.0 + number / 10 for number in range(30)]
    whole = list(model.map(scales, body, prompts=[1, 2, 3, 4], to=tmp_path / "whole"))
    began = iter(model.map(scales, body, prompts=[1, 2, 3, 4], to=tmp_path / "sweep"))
    next(began)
    began.close()  # type: ignore[attr-defined]
    parts = list(model.map(scales, body, prompts=[1, 2, 3, 4], to=tmp_path / "sweep"))
    assert len(parts) == len(whole) > 1 and files_of(tmp_path / "sweep") == files_of(tmp_path / "whole")
    rows = torch.cat([part["logits"] for part in parts])
    assert rows.shape == (30, 64) and (rows[0] - rows[29]).abs().max() > 1e-3
    for others in ([*scales[:5], 7.0, *scales[6:]], [2.0, *scales[1:]]):
        with pytest.raises(ConflictError, match=r"other prompts than|the body"):
            model.map(others, body, prompts=[1, 2, 3, 4], to=tmp_path / "sweep").run()


def test_an_address_of_fsspec_is_a_folder(model: Model, tmp_path: Path) -> None:
    import fsspec

    whole = finished(model, tmp_path)
    began = iter(model.map(PROMPTS, body_of(model), to="memory://maps/one"))
    next(began)
    began.close()  # type: ignore[attr-defined]
    assert same(finished(model, "memory://maps/one"), whole)
    files = fsspec.filesystem("memory")
    assert {path.rpartition("/")[2]: files.cat_file(path) for path in files.ls("/maps/one", detail=False)} == files_of(
        tmp_path
    )


def test_a_folder_that_cannot_be_written_ends_the_map(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((OSError, GraphError)):
        model.map(PROMPTS, body_of(model), to=tmp_path / "file").run()


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_map_folders import PROMPTS, body_of
from engine.local import LocalBackend
from polytrace.model import Model
from scheduling.policy import PassPolicy

model = Model(LocalBackend({weights!r}, threads=1, policy=PassPolicy(budget_tokens=64, least_tokens=16)))
for part in model.map(PROMPTS, body_of(model), to={folder!r}):
    time.sleep(0.3)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(model: Model, weights: Path, tmp_path: Path) -> None:
    whole = finished(model, tmp_path / "whole")
    folder = tmp_path / "map"
    program = PROGRAM.format(here=str(Path(__file__).parent), weights=str(weights), folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "part-00001.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not json.loads((folder / "index.json").read_bytes())["is_complete"]
    assert same(finished(model, folder), whole)
    names = files_of(tmp_path / "whole")
    assert {name: data for name, data in files_of(folder).items() if not name.startswith(".")} == names
