"""What calls of a model as it is keep for the way back of gradients, worked out without weights before they run.

Each call is recorded once on the twin that its sites were found on (`engine.whole_sites`), up to its last site, with
its seams where the request asks for gradients and its writes where it writes: the same code as in a pass. Counted are
what operations keep, the leaves of seams, and a gradient for each of these.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from engine.arguments import Selector
from engine.probe import named_tensors
from engine.recorder import memory_of
from engine.saved import SavedTensors
from engine.whole_call import Enough, Visits, WholeCall, current, hooked
from engine.whole_side import Side
from engine.whole_sites import CallSites, arguments_of, told
from engine.whole_tape import Cut, NoGradientError, WholeTape, cuts_of
from engine.writes import member_of
from polytrace.description import SiteInfo
from polytrace.errors import GraphError
from polytrace.graph import Inputs, Read, Write
from scheduling.plan import Program

_MOST_KNOWN = 256

Run = Callable[[nn.Module, Inputs], int]


class CallTapes:
    """Of one model."""

    def __init__(self, sites: CallSites, offloaded: Collection[str] = ()) -> None:
        """`offloaded`: modules whose weights come for each call, and stay for its way back."""
        self._sites = sites
        self._offloaded = frozenset(offloaded)
        self._known: OrderedDict[Hashable, tuple[tuple[SiteInfo, ...], int]] = OrderedDict()

    def num_bytes(
        self,
        program: Program,
        of_invokes: Sequence[tuple[SiteInfo, ...]],
        really: Callable[[Inputs, Run], int] | None = None,
    ) -> int:
        """Of all calls of a program, as if all tapes were there at once. `of_invokes`: the sites of each of its calls;
        `really` runs the model itself, where what a call visits depends on its values. GraphError where a call cannot
        be recorded without data, and nobody runs the model.
        """
        total = 0
        for wave, work in enumerate(program.waves):
            if not work.is_taped:
                continue
            for invoke, cuts in cuts_of(program, wave).items():
                call = _Recorded(program, wave, invoke, cuts, self._offloaded)
                key = id(of_invokes[invoke]), call.signature
                if key not in self._known:
                    self._known[key] = of_invokes[invoke], self._recorded(program, invoke, call.run, really)
                    if len(self._known) > _MOST_KNOWN:
                        self._known.popitem(last=False)
                self._known.move_to_end(key)
                total += self._known[key][1]
        return total

    def _recorded(self, program: Program, invoke: int, run: Run, really: Callable[[Inputs, Run], int] | None) -> int:
        inputs = program.invokes[invoke].inputs
        assert inputs is not None, "the request was checked"
        try:
            found = self._sites.on_twin(inputs, program.constants, run)
        except NoGradientError:
            return 0  # it ends where it is recorded
        except Exception as error:  # whatever code of the model raises without data
            if really is None:
                raise GraphError(f"what this gradient would keep cannot be worked out: {told(error)}") from error
            found = None
        if found is not None:
            return found
        if really is None:
            raise GraphError("what this gradient would keep cannot be worked out: what a call visits depends on values")
        try:
            return really(inputs, run)
        except Exception:  # noqa: BLE001  the pass tells its user why
            return 0


class _Recorded:
    """One call of a wave, as far as its tape depends on the request."""

    def __init__(
        self,
        program: Program,
        wave: int,
        invoke: int,
        cuts: dict[int, dict[Selector, Cut]],
        offloaded: frozenset[str],
    ) -> None:
        nodes = program.graph.nodes
        self._cuts = cuts
        self._offloaded = offloaded
        self._visits: Visits = {}
        self._writes: dict[int, list[Write]] = {}
        for fragment in program.waves[wave].stages[0].fragments:
            for node in map(nodes.__getitem__, fragment.nodes):
                if isinstance(node, (Read, Write)) and node.invoke == invoke:
                    self._visit(node, fragment.order)
                    if isinstance(node, Write):
                        self._writes.setdefault(fragment.order, []).append(node)
        for order, selectors in cuts.items():
            for at in (nodes[cut.node] for cut in selectors.values()):
                assert isinstance(at, (Read, Write))
                self._visit(at, order)

    def _visit(self, node: Read | Write, order: int) -> None:
        self._visits[node.site.module, node.site.port, node.site.visit] = order

    @property
    def signature(self) -> Hashable:
        writes = [(order, node.site.selector, node.in_place) for order in self._writes for node in self._writes[order]]
        cuts = [
            (order, tuple((way, cut.is_of_holders) for way, cut in own.items())) for order, own in self._cuts.items()
        ]
        return tuple(self._visits.items()), tuple(writes), tuple(cuts)

    def run(self, model: nn.Module, called: Inputs) -> int:
        """Bytes that the call keeps."""
        named = dict(named_tensors(model))
        coming = [tensor for path, tensor in named.items() if path.rpartition(".")[0] in self._offloaded]
        saved = SavedTensors(coming=frozenset(map(memory_of, coming)))
        tape = WholeTape(cuts=self._cuts, own=frozenset(map(memory_of, named.values())), saved=saved)

        def come(order: int, value: Any) -> Any:
            side = Side(value, call.changing, ())
            with torch.no_grad():
                for write in self._writes.get(order, ()):
                    tensor = side.value
                    for key in write.site.selector:
                        tensor = member_of(tensor, key)
                    side.write(write.site.selector, torch.zeros_like(tensor), in_place=write.in_place)
            return side.value

        call = WholeCall(self._visits, come=come, tape=tape)
        with call.recording(), hooked(model, call), current(call), suppress(Enough):
            args, kwargs = arguments_of(called)
            model(*args, **kwargs)
        return tape.num_bytes + tape.gradient_bytes
