"""The benchmark of loading compares loads that end with the right weights, and reads of the same bytes."""

from __future__ import annotations

import pytest
import torch

from bench import loading
from bench.loading import LoadingConfig


@pytest.mark.wide
def test_every_row_is_of_right_weights_and_tells_rates() -> None:
    threads = torch.get_num_threads()
    figures = loading.run(LoadingConfig(layers=2, hidden=128, vocabulary=256, file_size="300KB", rounds=1, threads=1))
    torch.set_num_threads(threads)
    assert loading.is_right(figures)
    assert [row["condition"] for row in figures["rows"]] == ["warm", "evicted"]
    for row in figures["rows"]:
        assert set(row["gb_s"]) == {"files", "files again", "safetensors", "shard", "last of 2 stages"}
        assert all(rate > 0 for rate in row["gb_s"].values())
    assert "evicted: GB/s: files" in loading.tell(figures)
    assert not loading.is_right(figures | {"parameters_that_differ": 1})
