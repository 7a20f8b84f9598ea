"""nnsight's keywords are taken with a meaning, or refused with the nearest name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, small_llama

import polytrace
from polytrace.errors import GraphError
from polytrace.keywords import chosen_device, chosen_places


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    small_llama().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    with polytrace.load(
        str(folder),
        threads=1,
        device_map={"": "cpu"},
        dispatch=True,
        torch_dtype=torch.float32,
        trust_remote_code=False,
    ) as made:
        yield made


def test_a_program_with_nnsights_keywords_runs(model: Any) -> None:
    assert model.description.dtype == "float32"
    with model.trace(IDS, remote=False, scan=False, validate=False, backend=None, invoker_args={}, blocking=True):
        hidden = model.model.layers[0].output.save()
    with model.scan(IDS, remote=True):
        scanned = model.model.layers[0].output
    assert hidden.shape == scanned.shape


def test_torch_dtype_is_dtype(folder: Path) -> None:
    for chosen in ({"dtype": torch.bfloat16}, {"torch_dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}):
        with polytrace.load(str(folder), threads=1, device_map="cpu", **chosen) as model:
            assert model.description.dtype == "bfloat16"


def test_what_cannot_be_honoured_is_told(model: Any, folder: Path) -> None:
    with pytest.raises(GraphError, match=r"polytrace\.load has no keyword 'device_mp'; did you mean device_map"):
        polytrace.load(str(folder), device_mp="auto")
    with pytest.raises(GraphError, match="no code that comes with a model is run"):
        polytrace.load(str(folder), trust_remote_code=True)
    with pytest.raises(GraphError, match="give one of them"):
        polytrace.load(str(folder), dtype="float32", torch_dtype="bfloat16")
    with pytest.raises(GraphError, match="on one device: a service splits it"):
        polytrace.load(str(folder), device_map={"model.layers.0": 0, "model.layers.1": 1})
    with pytest.raises(GraphError, match=r"model\.trace has no keyword 'sed'; did you mean seed") as error:
        model.trace(IDS, sed=3)
    assert error.value.where is not None and error.value.where.startswith("test_keywords.py")
    with pytest.raises(GraphError, match=r"save model\.output in it"):
        model.trace(IDS, trace=False)
    with pytest.raises(GraphError, match=r"give the prompts to model\.trace"):
        model.trace(IDS, invoker_args={"scan": True})


@pytest.mark.parametrize(
    ("given", "device"),
    [({"": 0}, "cuda:0"), (1, "cuda:1"), ({"": "cpu"}, "cpu"), ("auto", None), ({"a.0": 0, "a.1": 0}, "cuda:0")],
)
def test_a_device_map_names_one_device(given: Any, device: str | None) -> None:
    assert chosen_device(None, given) == device


def test_parts_of_a_model_that_is_called_are_no_device() -> None:
    assert chosen_places(None, {"a": "cpu"}) == (None, {"a": "cpu"}), "whether these are all of it is seen later"
    assert chosen_places(None, {"": "disk"}) == (None, {"": "disk"})
    assert chosen_places("cuda", {"": 1}) == ("cuda:1", None)


@pytest.mark.parametrize("given", ["cuda:0", {"": 0}, {"a": 0}, {"a": 0, "b": "cpu"}], ids=str)
def test_a_device_beside_a_map_of_another_one_is_refused(given: Any) -> None:
    with pytest.raises(GraphError, match=r"device is cpu, and device_map is of cuda.*give one of them \(test_keywords"):
        chosen_places("cpu", given)


def test_names_that_spread_are_refused_for_a_language_model_as_a_service_does() -> None:
    with pytest.raises(GraphError, match=r"device_map is 'balanced', and polytrace\.load runs a language model on one"):
        chosen_device(None, "balanced")
    assert chosen_device("cuda:1", "auto") == "cuda:1"


@pytest.mark.parametrize("chosen", [{"device": "cuda:70"}, {"device_map": {"": 63}}], ids=str)
def test_a_gpu_that_is_not_there_is_told_before_anything_is_loaded(folder: Path, chosen: Any) -> None:
    told = rf"is not there: this machine has {torch.cuda.device_count()} GPUs?; write \"cpu\".*\(test_keywords"
    with pytest.raises(GraphError, match=told):
        polytrace.load(str(folder), **chosen)
    with pytest.raises(GraphError, match="device 'gpu' is no device"):
        polytrace.load(str(folder), device="gpu")
