"""Activations of a dataset in a folder beside plain Hugging Face's, one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import Both, close
from torch import Tensor

from polytrace.errors import ConflictError, GraphError, NotFoundError
from polytrace.maps import mapping
from polytrace.methods import Activations, collect_activations

_draw = torch.Generator().manual_seed(0)
DATASET = [torch.randint(3, 90, (3 + n % 4,), generator=_draw).tolist() for n in range(11)]


@pytest.fixture(scope="module")
def served(beside: Callable[[str], Both]) -> Both:
    return beside("llama")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts a part."""
    monkeypatch.setattr(mapping, "_MAX_PROMPTS", 4)


def rows_by_hand(served: Both, place: tuple[str, str]) -> list[Tensor]:
    return [served.run(ids, [place])[1][place][0] for ids in DATASET]


@pytest.mark.usefixtures("small_parts")
def test_all_rows_are_one_tensor_also_where_a_parts_prompts_are_of_one_length(served: Both, tmp_path: Path) -> None:
    place = ("model.layers.1", "output")
    for name, lengths in (("ragged", [5] * 4 + [3, 6, 4, 6]), ("equal", [5] * 4 + [6] * 4)):
        dataset = [list(range(7 + n, 7 + n + length)) for n, length in enumerate(lengths)]
        found = collect_activations(served.model, dataset, to=tmp_path / name, layers=1).array("resid_post.1")
        close(found, torch.cat([served.run(ids, [place])[1][place][0] for ids in dataset]))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("positions", [None, -1, [0, -2]])
def test_rows_are_those_of_each_prompt_alone(served: Both, positions: Any, tmp_path: Path) -> None:
    found = collect_activations(
        served.model, iter(DATASET), to=tmp_path, of=["resid_post", "z"], layers=[1, 3], positions=positions
    )
    assert found.names == ("resid_post.1", "resid_post.3", "z.1", "z.3")
    assert len(found) == 11 and found.is_complete and len(list(found)) == 3
    hand = rows_by_hand(served, ("model.layers.3", "output"))
    heads = [one.reshape(-1, 4, 8) for one in rows_by_hand(served, ("model.layers.1.self_attn.o_proj", "input"))]
    where = slice(None) if positions is None else [positions] if isinstance(positions, int) else positions
    for name, own in (("resid_post.3", hand), ("z.1", heads)):
        batches = list(found.batches(name, 5))
        close(torch.cat([batch.rows for batch in batches]), torch.cat([one[where] for one in own]))
        prompts = [number for number, one in enumerate(own) for _ in one[where]]
        assert torch.cat([batch.prompts for batch in batches]).tolist() == prompts
        assert torch.cat([batch.places for batch in batches]).tolist() == [
            n for one in own for n in range(len(one[where]))
        ]
    assert found.array("z.1").shape[-2:] == (4, 8)


@pytest.mark.usefixtures("small_parts")
def test_shuffled_batches_have_every_row_once_with_its_label(served: Both, tmp_path: Path) -> None:
    collect_activations(served.model, DATASET, to=tmp_path, layers=2)
    found = Activations(tmp_path)
    labels = [len(ids) for ids in DATASET]
    straight, mixed = (list(found.batches("resid_post.2", 6, labels=labels, shuffle=seed)) for seed in (None, 5))
    order = torch.cat([batch.prompts for batch in mixed]) * 100 + torch.cat([batch.places for batch in mixed])
    back = order.argsort()
    assert back.tolist() != list(range(len(back)))
    assert torch.equal(torch.cat([batch.rows for batch in mixed])[back], torch.cat([batch.rows for batch in straight]))
    for batch in mixed:
        assert batch.labels is not None and batch.labels.tolist() == [labels[n] for n in batch.prompts.tolist()]
        assert len(batch.rows) <= 6
    with pytest.raises(GraphError, match=r"there are 3 labels, and a prompt"):
        list(found.batches("resid_post.2", labels=[1, 2, 3]))


@pytest.mark.usefixtures("small_parts")
def test_collecting_goes_on_behind_the_last_complete_part(served: Both, tmp_path: Path) -> None:
    def broken() -> Iterator[list[int]]:
        yield from DATASET[:9]
        raise RuntimeError("the disk of the dataset is gone")

    with pytest.raises(RuntimeError, match="is gone"):
        collect_activations(served.model, broken(), to=tmp_path / "a", layers=2)
    begun = Activations(tmp_path / "a")
    assert not begun.is_complete and len(begun) == 8
    first = (tmp_path / "a" / "part-00000.safetensors").stat().st_mtime_ns
    again = collect_activations(served.model, DATASET, to=tmp_path / "a", layers=2)
    whole = collect_activations(served.model, DATASET, to=tmp_path / "b", layers=2)
    assert torch.equal(again.array("resid_post.2"), whole.array("resid_post.2"))
    assert (tmp_path / "a" / "part-00000.safetensors").stat().st_mtime_ns == first
    with pytest.raises(ConflictError, match="is of another map"):
        collect_activations(served.model, DATASET, to=tmp_path / "a", layers=1)


def test_what_cannot_be_collected_or_read_is_told(served: Both, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=r"'pattern' has no row for each token.*test_collecting.py"):
        collect_activations(served.model, DATASET, to=tmp_path, of="pattern")
    with pytest.raises(NotFoundError, match="there are no activations"):
        Activations(tmp_path / "nowhere")
    found = collect_activations(served.model, DATASET, to=tmp_path, layers=2, positions=-1)
    with pytest.raises(NotFoundError, match=r"has no 'resid_post.1'; it has resid_post.2"):
        found.array("resid_post.1")
    part = tmp_path / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ConflictError, match=r"is not what index\.json says"):
        found.array("resid_post.2")
