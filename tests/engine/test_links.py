"""Real processes over gloo: what arrives, in which order, and what is counted."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from processes import in_processes

from engine.links import Distributed, Solo, as_bytes, join_store, open_store
from polytrace.errors import ServiceError

STAGES, RANKS = 2, 2
DTYPES = (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8)


def own(stage: int, rank: int) -> torch.Tensor:
    return torch.arange(6, dtype=torch.float32).reshape(2, 3) + 100 * stage + 10 * rank


def shard(index: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    links = Distributed(
        join_store("127.0.0.1", port), stage=index // RANKS, stages=STAGES, rank=index % RANKS, ranks=RANKS
    )
    seen: dict[str, object] = {}
    seen["gathered 0"] = links.gather(own(links.stage, links.rank), 0)
    seen["gathered -1"] = links.gather(own(links.stage, links.rank), -1)
    seen["gathered empty"] = links.gather(torch.empty(2, 0), -1)
    uneven = torch.tensor([1e8, 1.0, -1e8]) * (links.rank + 1) / 3
    seen["sum"], seen["part"] = links.ordered_sum(uneven), uneven
    seen["half sum"] = links.ordered_sum(torch.tensor([1.0, 2.0**-9], dtype=torch.bfloat16))
    other = 1 - links.stage
    before = links.bytes.sent
    for step in range(3):  # both directions at once, several in flight
        for dtype in DTYPES:
            links.send((own(links.stage, links.rank) % (step + 2)).to(dtype), other)
        links.send(torch.empty(0), other)
    received = []
    for step in range(3):
        for dtype in DTYPES:
            value = links.receive((2, 3), dtype, other)
            received.append(bool(torch.equal(value, (own(other, links.rank) % (step + 2)).to(dtype))))
        received.append(links.receive((0,), torch.float32, other).shape == (0,))
    links.flush()
    seen["received"] = received
    seen["sent bytes"] = links.bytes.sent - before
    seen["gathered bytes"] = links.bytes.gathered
    links.barrier()
    torch.save(seen, Path(out) / f"{index}.pt")
    links.barrier()
    links.close()


def survivor(index: int, port: int, out: str) -> None:
    links = Distributed(join_store("127.0.0.1", port), stage=index, stages=2, rank=0, ranks=1, timeout_s=60)
    links.barrier()
    if index == 1:
        return  # dies without a word
    with pytest.raises(ServiceError, match="lost stage 1"):
        links.receive((4,), torch.float32, 1)
    (Path(out) / "told").write_text("yes")


def chained(index: int, port: int, out: str) -> None:
    """Stage 2 waits for stage 1, which waits for stage 0, which dies."""
    links = Distributed(join_store("127.0.0.1", port), stage=index, stages=3, rank=0, ranks=1, timeout_s=60)
    links.barrier()
    if index == 0:
        return
    try:
        links.receive((4,), torch.float32, index - 1)
    except ServiceError as failure:
        links.close()
        told = Path(out) / "told"
        if index == 2:
            told.write_text(str(failure))
        for _ in range(200):  # the failure is not over here before the other has heard of it
            if told.exists():
                break
            time.sleep(0.1)
        assert told.exists(), "the neighbour was not told while the failure was being handled"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    out = tmp_path_factory.mktemp("links")
    store = open_store("127.0.0.1")
    in_processes(shard, (store.port, str(out)), STAGES * RANKS)
    return [torch.load(out / f"{index}.pt") for index in range(STAGES * RANKS)]


def test_a_gather_is_the_concatenation_in_rank_order_within_the_stage(seen: list[dict[str, object]]) -> None:
    for index, each in enumerate(seen):
        parts = [own(index // RANKS, rank) for rank in range(RANKS)]
        assert torch.equal(each["gathered 0"], torch.cat(parts, 0))
        assert torch.equal(each["gathered -1"], torch.cat(parts, -1))
        assert each["gathered empty"].shape == (2, 0)


def test_an_ordered_sum_adds_in_rank_order_on_every_rank(seen: list[dict[str, object]]) -> None:
    for stage in range(STAGES):
        ranks = seen[stage * RANKS : (stage + 1) * RANKS]
        expected = ranks[0]["part"] + ranks[1]["part"]
        for each in ranks:
            assert torch.equal(each["sum"], expected)
            assert each["half sum"].dtype == torch.bfloat16
            assert each["half sum"].tolist() == [2.0, 2.0**-8]


def test_every_dtype_arrives_in_order_in_both_directions_at_once(seen: list[dict[str, object]]) -> None:
    for each in seen:
        assert each["received"] == [True] * 3 * (len(DTYPES) + 1)


def test_bytes_sent_and_gathered_are_counted(seen: list[dict[str, object]]) -> None:
    for each in seen:
        assert each["sent bytes"] == 3 * 6 * sum(dtype.itemsize for dtype in DTYPES)
        assert each["gathered bytes"] == 2 * 6 * 4


def test_a_dead_neighbour_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    store = open_store("127.0.0.1")
    in_processes(survivor, (store.port, str(tmp_path)), 2)
    assert (tmp_path / "told").read_text() == "yes"


def test_a_neighbour_is_told_while_the_failure_that_it_follows_from_is_still_being_handled(tmp_path: Path) -> None:
    store = open_store("127.0.0.1")
    in_processes(chained, (store.port, str(tmp_path)), 3)
    assert "lost stage 1" in (tmp_path / "told").read_text()


def test_a_shard_that_is_alone_gathers_and_sums_itself() -> None:
    links, value = Solo(), torch.arange(4.0)
    assert links.gather(value, 0) is value
    assert links.ordered_sum(value) is value
    with pytest.raises(ServiceError, match="alone"):
        links.send(value, 1)


def test_a_single_element_of_a_larger_tensor_is_bytes_too() -> None:
    row = torch.arange(12.0).view(3, 4)
    assert torch.equal(as_bytes(row[1:2, 2:3]).view(torch.float32), torch.tensor([6.0]))
    assert torch.equal(as_bytes(row.t()).view(torch.float32), row.t().reshape(-1))
