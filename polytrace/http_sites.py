"""What calls of a served model visit, asked of the service once for each structure of arguments.

Where the service had to look at integers among them, it says so, and calls of other integers are asked for anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from polytrace.codec import from_json
from polytrace.description import SiteInfo
from polytrace.given import given_names, structure_of
from polytrace.given_json import question
from polytrace.graph import Inputs
from polytrace.tensors import RawTensor

_MAX_KNOWN = 256  # answers that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class CallAnswer:
    """What a call visits, in its order."""

    sites: tuple[SiteInfo, ...]
    has_looked: bool  # at values of integers: it holds for these alone


class HttpSites:
    """Of one model. `ask` sends a question and gives the answer as JSON."""

    def __init__(self, ask: Callable[[Any], Any]) -> None:
        self._ask = ask
        self._known: OrderedDict[str, tuple[SiteInfo, ...]] = OrderedDict()
        self._looks: set[str] = set()  # structures of which values matter

    def of(self, inputs: Inputs, constants: Mapping[str, RawTensor]) -> tuple[SiteInfo, ...]:
        """The same object where it is the same."""
        names = list(dict.fromkeys(given_names(inputs)))
        asked = question(inputs, constants, names)
        structure = repr(structure_of(inputs, constants))
        key = repr(asked) if structure in self._looks else structure
        if key not in self._known:
            answer = from_json(CallAnswer, self._ask(asked))
            if answer.has_looked:
                self._looks.add(structure)
                key = repr(asked)
            self._known[key] = answer.sites
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return self._known[key]
