"""Seconds that a stage takes for its part of a pass: the slower of arithmetic and memory, and what moves.

A roofline (Williams, Waterman, Patterson, "Roofline", CACM 52, 2009), piece by piece: each layer, then the head. No
real run beats it and few come close: kernels are taken to reach the maker's peak, and nothing is taken to wait. A
stage's layers are taken to be alike. Rows are looked up in embeddings for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.planning.hardware import Hardware
from engine.census import Census, Kind, StageShare

FLOAT_BYTES = 4  # attention and the key/value store work in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSeconds:
    """Of one stage and one pass. Its ranks are alike."""

    work_s: float
    sum_s: float  # adding up over ranks
    send_s: float  # to the next stage

    @property
    def all_s(self) -> float:
        return self.work_s + self.sum_s + self.send_s


class Roofline:
    """One split of a model over the GPUs that there are."""

    def __init__(self, census: Census, hardware: Hardware, gpus_a_node: int, *, stages: int, ranks: int) -> None:
        """ServiceError when the model cannot be split so."""
        self.shares = census.shares(stages, ranks)
        self.hardware = hardware
        heads, _ = census.heads(ranks)
        self._pair_flops = 4 * heads * census.head_dim  # of a query and a key at one layer
        self._key_bytes = stored_row_bytes(census, ranks)
        self._head_flops = census.head_flops // ranks  # of a row
        self._row_bytes = census.hidden_size * census.itemsize
        self._itemsize, self._ranks = census.itemsize, ranks
        self._sum_rate = hardware.link_rate if ranks <= gpus_a_node else hardware.network_rate
        self._send_rates = [
            hardware.network_rate if (stage + 1) * ranks % gpus_a_node == 0 else hardware.link_rate
            for stage in range(stages)
        ]
        self._layers = [self._of_layer(share, stage == stages - 1) for stage, share in enumerate(self.shares)]
        self._head_bytes = [share.bytes_by_kind()[Kind.HEAD] for share in self.shares]

    def seconds(
        self,
        stage: int,
        *,
        rows: Sequence[int],
        pairs: Sequence[float],
        keys: Sequence[float] = (),
        head_rows: int = 0,
        sent_rows: int = 0,
    ) -> StageSeconds:
        """Of each of the stage's layers: its rows, the pairs of query and key, and keys that are read from the store
        (none by default). A layer without rows costs nothing. `head_rows` count on the last stage, `sent_rows` go to
        the next one.
        """
        row_flops, layer_bytes, summed = self._layers[stage]
        flops_s, bytes_s = self.hardware.flops, self.hardware.memory_rate
        work_s, num_rows = 0.0, 0
        for place, count in enumerate(rows):
            if not count:
                continue
            flops = count * row_flops + pairs[place] * self._pair_flops
            read = layer_bytes + (keys[place] * self._key_bytes if keys else 0)
            work_s += max(flops / flops_s, read / bytes_s)
            num_rows += count
        is_last = stage == len(self.shares) - 1
        if is_last and head_rows:
            work_s += max(head_rows * self._head_flops / flops_s, self._head_bytes[stage] / bytes_s)
        sum_s = num_rows * summed * self._itemsize * (self._ranks - 1) / self._sum_rate
        send_s = 0.0 if is_last else sent_rows * self._row_bytes / self._send_rates[stage]
        return StageSeconds(work_s=work_s, sum_s=sum_s, send_s=send_s)

    def _of_layer(self, share: StageShare, is_last: bool) -> tuple[float, float, float]:
        """Of one layer of a stage, on each rank: operations of a row, bytes of weights, features that ranks add up."""
        count = len(share.layers)
        head = self._head_flops if is_last else 0
        layers = share.bytes_by_kind()[Kind.LAYER]
        return (share.flops - head) / count, layers / count, share.summed_features / count


def stored_row_bytes(census: Census, ranks: int) -> int:
    """A row's keys and values at one layer, on each rank."""
    return 2 * census.heads(ranks)[1] * census.head_dim * FLOAT_BYTES
