"""What was found out of a request's values when it was checked, kept for whoever works it out: as JSON.

A request has one list, a fact or null for each of its nodes; a generation one for each different step, in the order in
which `scheduling.working_out` asks for them, as {"steps": [list, ...]}. A request to a model that is called as it is
has {"steps": [list], "sites": [list, ...], "tape_bytes": number}: of each invoke the sites that it names, and what
its calls keep for gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from polytrace.codec import from_json, to_json
from polytrace.description import ModelDescription, SiteInfo
from polytrace.errors import ServiceError
from polytrace.graph import Request
from scheduling.plan import Program, ValueFacts
from scheduling.steps import Facts, generates
from scheduling.whole import named_sites, with_sites


class FactsRecorder:
    """Asks, and writes the answers down."""

    def __init__(self, infer: Callable[[Request], Facts], description: ModelDescription | None = None) -> None:
        """`description`: the request's own, where calls have sites of their own."""
        self._infer = infer
        self._description = description
        self._lists: list[Facts] = []
        self.tape_bytes = 0  # of calls of a model as it is, as far as they were worked out

    def infer(self, request: Request) -> Facts:
        facts = self._infer(request)
        self._lists.append(facts)
        return facts

    def encode(self, request: Request) -> bytes:
        """What was written down of this request."""
        plain = [to_json(facts) for facts in self._lists]
        if self._description is not None and self._description.of_invokes:
            sites = to_json(named_sites(request, self._description))
            return json.dumps({"steps": plain, "sites": sites, "tape_bytes": self.tape_bytes}).encode()
        return json.dumps({"steps": plain} if generates(request) else plain[0]).encode()


class RecordedFacts:
    """Gives what was written down, list by list."""

    def __init__(self, body: bytes) -> None:
        plain = json.loads(body)
        self._lists = iter(plain["steps"] if isinstance(plain, dict) else [plain])
        self._sites = plain.get("sites") if isinstance(plain, dict) else None
        self._tape_bytes: int = plain.get("tape_bytes", 0) if isinstance(plain, dict) else 0

    def described(self, description: ModelDescription) -> ModelDescription:
        """The description that the request was checked against: where it has sites of its own, with these."""
        if self._sites is None:
            return description
        of_invokes = tuple([tuple([from_json(SiteInfo, site) for site in sites]) for sites in self._sites])
        return with_sites(description, of_invokes)

    def taped(self, program: Program) -> Program:
        """The program, with what its calls keep for gradients, where that was worked out beside it."""
        return program if not self._tape_bytes else replace(program, tape_bytes=self._tape_bytes)

    def infer(self, request: Request) -> Facts:
        """Raises ServiceError where this is not what was asked when it was checked."""
        found = next(self._lists, None)
        if found is None or len(found) != len(request.graph.nodes):
            raise ServiceError("the request is worked out in other steps than when it was checked: send it again")
        return tuple([None if plain is None else from_json(ValueFacts, plain) for plain in found])
