"""What code would cost: its traces are recorded and certified, and nothing runs.

`with model.pricing() as pricing:` gives `pricing.model`, which is given to the code in the place of the model, a method
or a loop of traces. What has been certified adds up in `pricing.price`. Code that needs a number of a result cannot go
on without it: the block ends there, and the price says that it is partial.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from polytrace.backend import Result
from polytrace.certificate import Certificate, Price, price_of
from polytrace.errors import GraphError
from polytrace.graph import Request

if TYPE_CHECKING:
    from polytrace.backend import Backend
    from polytrace.model import Model

TOLD = "this trace was priced: nothing ran, so its values have no data"


class PricedError(GraphError):
    """In the place of a result."""

    def __init__(self) -> None:
        super().__init__(TOLD)


class Pricing:
    """A block of code that is priced."""

    def __init__(self, model: Model) -> None:
        from polytrace.modules import Module

        own = {name: value for name, value in vars(model).items() if not isinstance(value, Module)}
        self.certificates: list[Certificate] = []  # of what would have run, in order, without shapes of single values
        self.model: Model = object.__new__(type(model))
        backend = _PricingBackend(model.backend, self.certificates)
        self.model.__dict__.update(own, _model=self.model, base=model.base, backend=backend)
        self._is_partial = False

    @property
    def price(self) -> Price:
        """Of all that was recorded so far."""
        from dataclasses import replace

        return replace(price_of(self.certificates), is_partial=self._is_partial)

    def __enter__(self) -> Pricing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._is_partial |= isinstance(error, GraphError) and TOLD in error.message
        return self._is_partial and error is not None


class _PricingBackend:
    """The backend of a model that is priced."""

    def __init__(self, backend: Backend, certificates: list[Certificate]) -> None:
        self._backend = backend
        self._certificates = certificates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, request: Request, *_: Any) -> Result:
        self._certificates.append(self._backend.validate(request).without_values())
        raise PricedError
