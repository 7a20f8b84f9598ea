"""Tensors of files: any slice of them is what safetensors gives, by reading little more than its bytes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.reading import Reader, Reading, WeightFile
from polytrace.errors import ServiceError

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "matrix": torch.randn(64, 4096, generator=GENERATOR),
    "narrow": torch.randn(3000, 48, generator=GENERATOR).to(torch.bfloat16),
    "experts": torch.randn(6, 40, 1500, generator=GENERATOR),
    "vector": torch.randn(1000, generator=GENERATOR).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 7),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("files") / "weights.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return str(file)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@given(st.data())
def test_any_slice_is_that_of_the_tensor(path: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    whole = TENSORS[name]
    index = []
    for size in whole.shape[: data.draw(st.integers(0, whole.dim()))]:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    with Reader() as reader, closing(WeightFile(path, reader)) as file:
        tensor = file.tensors[name]
        assert tensor.get_shape() == list(whole.shape) and tensor.dtype is whole.dtype
        found, expected = tensor[tuple(index)], whole[tuple(index)]
        assert found.shape == expected.shape and torch.equal(bits(found), bits(expected))
        assert torch.equal(bits(tensor[...]), bits(whole))


def test_only_the_asked_bytes_are_read_where_they_fill_pages(path: str) -> None:
    with Reader() as reader, closing(WeightFile(path, reader)) as file:
        for index in (slice(8, 24), (slice(None), slice(1024, 2048)), (slice(3, 5), slice(0, 4000))):
            before = reader.read_bytes
            assert file.tensors["matrix"][index].nbytes == reader.read_bytes - before


def test_a_large_tensor_is_read_in_pieces_and_told_of(tmp_path: Path) -> None:
    whole = torch.randn(100, 1001)
    save_file({"a": whole}, tmp_path / "a.safetensors")
    told: list[str | Reading] = []
    path = str(tmp_path / "a.safetensors")
    with Reader(told.append, piece_bytes=1 << 12, tell_s=0.0) as reader, closing(WeightFile(path, reader)) as file:
        reader.total_bytes = whole.nbytes
        assert torch.equal(file.tensors["a"][...], whole)
        assert torch.equal(file.tensors["a"][:, :100], whole[:, :100])
    readings = [each for each in told if isinstance(each, Reading)]
    done = [each.read_bytes for each in readings]
    assert len(done) > 90 and done == sorted(done) and whole.nbytes in done
    assert all(each.read_bytes <= each.total_bytes for each in readings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"\xff" * 64, "no safetensors file"),
        (lambda data: b"", "no safetensors file"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: data.replace(b"BF16", b"BF17"), "BF17"),
        (lambda data: data.replace(b"[3000,48]", b"[3000,49]"), "lies about narrow"),
    ],
)
def test_a_damaged_file_is_refused_with_what_is_wrong(damage: object, message: str, path: str, tmp_path: Path) -> None:
    assert callable(damage)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(damage(Path(path).read_bytes()))
    with Reader() as reader, pytest.raises(ServiceError, match=message):
        WeightFile(str(broken), reader)
    with Reader() as reader, pytest.raises(ServiceError, match="absent"):
        WeightFile(str(tmp_path / "absent"), reader)


def test_what_was_read_does_not_change_with_the_file(path: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    data = Path(path).read_bytes()
    copy.write_bytes(data)
    with Reader() as reader, closing(WeightFile(str(copy), reader)) as file:
        rows = file.tensors["matrix"][8:24]
        with copy.open("r+b") as opened:
            opened.write(b"\0" * len(data))
    assert torch.equal(rows, TENSORS["matrix"][8:24])
