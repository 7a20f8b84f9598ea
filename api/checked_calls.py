"""In a worker: what calls of a model that is called as it is visit, and what they keep for gradients, within a time.

Code of the model's library runs to find it out, on tensors without data. Nobody may hold a worker up with a call that
makes it run for long. Imports torch: workers alone import it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from api.time_limits import within
from engine.whole_sites import CallSites
from engine.whole_tapes import CallTapes
from polytrace.description import SiteInfo
from polytrace.graph import Inputs, Request
from polytrace.tensors import RawTensor
from scheduling.plan import Program
from scheduling.whole import inputs_of_all

PATIENCE_S = 60.0  # for all calls of one request, or one question


class CheckedCalls:
    """Of one model. What is asked raises TooLargeError where it takes too long."""

    def __init__(
        self, meta: nn.Module, max_tensor_bytes: int, patience_s: float = PATIENCE_S, *, offloaded: Collection[str] = ()
    ) -> None:
        """`offloaded` as of `CallTapes`."""
        self._sites = CallSites(meta, max_tensor_bytes)
        self._tapes = CallTapes(self._sites, offloaded)
        self._patience_s = patience_s

    def of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[tuple[SiteInfo, ...], bool]:
        """The sites of one call, and whether its values were looked at."""
        with self._in_time():
            return self._sites.of(inputs, constants), self._sites.has_looked(inputs, constants)

    def of_all(self, request: Request) -> list[tuple[SiteInfo, ...]]:
        """The sites of each call of a request."""
        with self._in_time():
            return [self._sites.of(inputs, request.constants) for inputs in inputs_of_all(request)]

    def tape_bytes(self, program: Program, of_invokes: Sequence[tuple[SiteInfo, ...]]) -> int:
        """What its calls keep for gradients, as of `CallTapes`."""
        with self._in_time():
            return self._tapes.num_bytes(program, of_invokes)

    def _in_time(self) -> AbstractContextManager[None]:
        told = f"what these calls visit was not found out within {self._patience_s:g} s: send fewer, or smaller ones"
        return within(self._patience_s, told)
