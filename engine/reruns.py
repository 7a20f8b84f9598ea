"""Layers that are run again on the way back of gradients, for want of memory (Chen et al. 2016, arXiv:1604.06174).

Such a layer keeps what came in and nothing else. When gradients come to it, it runs once more, as the pass ran it but
for visits: what a graph reads there it has read already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

# A context in which a layer can be run again.
Again = Callable[[], AbstractContextManager[None]]


class Rerun:
    """One layer's forward in one pass."""

    def __init__(self, layer: nn.Module, again: Callable[[], Again]) -> None:
        """`again` is asked when the layer runs at first, where it is known for whom."""
        self._layer, self._again = layer, again
        self._plain: Callable[..., Any] | None = None  # as it runs again
        self._visited: Callable[..., Any] | None = None  # as it runs at first, with visits of its operations

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Outside of this context the layer's forward is the one that runs again."""
        self._plain = self._layer.forward
        yield

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the layer keeps only what comes in."""
        before = self._layer.__dict__.get("forward")
        self._visited = self._layer.forward
        self._layer.__dict__["forward"] = self._run
        try:
            yield
        finally:
            if before is None:
                del self._layer.__dict__["forward"]
            else:
                self._layer.__dict__["forward"] = before

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        assert self._plain is not None and self._visited is not None
        plain, visited = self._plain, self._visited
        if not torch.is_grad_enabled():
            return visited(*args, **kwargs)
        anew = _Anew(self._again())

        def forward(*own: Any, **named: Any) -> Any:
            return (plain if anew.is_entered else visited)(*own, **named)

        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), anew),
            **kwargs,
        )


class _Anew:
    """Where a layer is run again, as often as gradients come to it."""

    def __init__(self, again: Again) -> None:
        self._again = again
        self._entered = ExitStack()
        self.is_entered = False

    def __enter__(self) -> None:
        self._entered.enter_context(self._again())
        self.is_entered = True

    def __exit__(self, *raised: Any) -> None:
        self.is_entered = False
        self._entered.close()
