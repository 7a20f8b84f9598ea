"""Values that go from one stage to another: all of a pass in one flat message, flags of failed graphs first."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.copies import to_device
from engine.fragments import RequestState
from engine.links import Links, as_bytes
from scheduling.plan import Transfer

Transfers = list[tuple[Transfer, ...]]  # of each request of the pass

_ALIGN = 16  # bytes: every value of a message starts where any dtype may
_FAILED_ELSEWHERE = "it failed on an earlier stage"


def send_values(
    links: Links, device: torch.device, states: list[RequestState], transfers: Transfers, target: int
) -> None:
    """What a stage is to have of each request, in the order of `transfers`."""
    values = [
        state.held(transfer.node, transfer.facts)
        for state, each in zip(states, transfers, strict=True)
        for transfer in each
        if transfer.source == links.stage and transfer.target == target
    ]
    flags = to_device([state.has_failed for state in states], device, torch.uint8)
    parts = [_padded(flags), *(_padded(value) for value in values)]
    links.send(torch.cat(parts), target)


def receive_values(links: Links, states: list[RequestState], transfers: Transfers, source: int) -> None:
    """What a stage has sent, into the requests' values; graphs that have failed there fail here."""
    expected = [
        (state, transfer)
        for state, each in zip(states, transfers, strict=True)
        for transfer in each
        if transfer.source == source and transfer.target == links.stage
    ]
    sizes = [_aligned(transfer.facts.num_bytes) for _, transfer in expected]
    head = _aligned(len(states))
    message = links.receive((head + sum(sizes),), torch.uint8, source)
    # On a GPU this is where the host waits, once a stage and pass: what a failed graph's nodes would do is decided
    # here.
    for state, has_failed in zip(states, message[: len(states)].tolist(), strict=True):
        if has_failed:
            state.fail(None, _FAILED_ELSEWHERE)
    start = head
    for (state, transfer), size in zip(expected, sizes, strict=True):
        raw = message[start : start + transfer.facts.num_bytes]
        dtype = getattr(torch, transfer.facts.dtype)
        state.values[transfer.node] = raw.view(dtype).reshape(transfer.facts.shape)
        start += size


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _padded(tensor: Tensor) -> Tensor:
    raw = as_bytes(tensor)
    return torch.nn.functional.pad(raw, (0, _aligned(raw.numel()) - raw.numel()))
