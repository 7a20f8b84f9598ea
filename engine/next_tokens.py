"""What the sequences of a pass go on with: drawn behind the model's output, seen and changed by graphs, then told.

Owns the visit of `Port.TOKEN`. Each sequence has a token of its own there, also where several have a row of logits in
common. How a token is drawn is `engine.sampling`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.copies import row_index
from engine.fragments import RequestState
from engine.leaves import port_leaves
from engine.links import Links
from engine.sampling import NO_TOKEN, Drawing, draw_tokens, log_likelihoods
from engine.slices import gather_whole
from engine.views import InvokeRows, RowView
from polytrace.description import Leaf, Rows
from polytrace.graph import Generation, NodeId, Port, Write
from scheduling.plan import NO_ROWS, Drawn, Member, RequestId, View

# K = sequences that go on, V = vocabulary

_NOTHING = "its logits say nothing of the next token: one is NaN, all are -inf, or one is inf where tokens are drawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Going:
    """One invoke whose sequences go on."""

    state: RequestState
    view: View
    step: int
    generation: Generation
    rows: RowView  # of the logits: its last column


class NextTokens:
    """The visit in one pass."""

    def __init__(
        self,
        members: Sequence[Member],
        states: Sequence[RequestState],
        views: Sequence[View],
        rows: Rows,
        logits: Leaf,
        links: Links,
        device: torch.device,
        readers: Container[tuple[int, int]] = (),
    ) -> None:
        """`rows` are those of the logits. `readers`: members and invokes of whose tokens something is read in this
        pass, also where they are not told because they change in a later one.
        """
        self._logits, self._links, self._device = logits, links, device
        self._going: list[_Going] = []
        count = 0
        for view in views:
            state = states[view.member]
            generation = state.program.invokes[view.invoke].generation
            if generation is None or not (view.is_drawing or (view.member, view.invoke) in readers):
                continue
            own = state.rows[view.invoke]
            last = _last(own, rows)
            if last.num_rows < sum(segment != NO_ROWS for segment in view.segments):
                continue  # somebody reads tokens, but nobody those of the last column
            own.first_token = count
            count += last.num_rows
            self._going.append(
                _Going(state=state, view=view, step=members[view.member].step, generation=generation, rows=last)
            )

    def visit(self, output: Any, visitor: Callable[[Any], Any]) -> Any:
        """Draws, lets `visitor` see and change what was drawn, and tells the requests' states. Returns the output."""
        packed_1TV = port_leaves(output)[1][self._logits.selector]
        rows = row_index([row for one in self._going for row in one.rows.numbers], self._device)
        logits_KV = packed_1TV[0][rows] if isinstance(rows, slice) else packed_1TV[0].index_select(0, rows)
        if self._logits.sharded_dim is not None:
            blocks, copies = self._logits.sharded_blocks, self._logits.sharded_copies
            logits_KV = gather_whole(self._links, logits_KV, 1, blocks, copies)
        drawn_K = draw_tokens(logits_KV, [_drawing(one) for one in self._going])
        self._tell(logits_KV, visitor(drawn_K[None])[0])
        return output

    def _tell(self, logits_KV: Tensor, tokens_K: Tensor) -> None:
        tokens = tokens_K.tolist()  # the one place in a pass where the host waits for the GPU: the next step needs it
        start = 0
        for one in self._going:
            stop = start + one.rows.num_rows
            own = tokens[start:stop]
            wrong = any(not 0 <= token < logits_KV.shape[1] for token in own)
            if one.state.has_failed or not one.view.is_drawing:
                pass
            elif wrong:
                _fail(one, own, logits_KV[start:stop])
            else:
                one.state.drawn.append(_told(one, own, logits_KV, tokens_K, start))
                one.state.note_tokens(one.view.invoke, one.rows.places, own)
            start = stop


def _last(invoke: InvokeRows, rows: Rows) -> RowView:
    """Of each sequence the row of its last token."""
    if rows is Rows.DECODER:
        return invoke.decoder
    last = (max(invoke.view.lengths) - 1,)
    return invoke.kept(last) if rows is Rows.KEPT else invoke.at(invoke.streams.num_layers, last)


def _drawing(one: _Going) -> Drawing:
    sampling = one.generation.sampling
    histories: Sequence[Sequence[int]] = ()
    if sampling.repetition_penalty != 1:
        histories = [one.state.histories[one.view.invoke, place] for place in one.rows.places]
    return Drawing(sampling=sampling, places=one.rows.places, step=one.step, histories=histories)


def _fail(one: _Going, tokens: Sequence[int], logits_KV: Tensor) -> None:
    """Fails a request with the first token that is none, at the line that wrote it if one did."""
    drawn = draw_tokens(logits_KV, [_drawing(one)]).tolist()  # again: what is written may be written in place
    num_tokens = logits_KV.shape[1]
    row = next(row for row, token in enumerate(tokens) if not 0 <= token < num_tokens)
    where = f"step {one.step} of prompt {one.rows.places[row]}"
    if tokens[row] == drawn[row] == NO_TOKEN:
        one.state.fail(None, f"{where}: {_NOTHING}; look at what the edits make of them")
        return
    nodes = one.state.program.graph.nodes
    writes = [
        NodeId(index)
        for index, node in enumerate(nodes)
        if isinstance(node, Write) and node.site.port is Port.TOKEN and node.invoke == one.view.invoke
    ]
    told = f"{where}: it is to go on with the token {tokens[row]}; ids are 0-{num_tokens - 1}"
    one.state.fail(writes[-1] if writes else None, told)


def _told(one: _Going, tokens: Sequence[int], logits_KV: Tensor, tokens_K: Tensor, start: int) -> Drawn:
    """`start`: the row of the first of its tokens."""
    count = len(one.view.lengths)
    found = [NO_ROWS] * count
    for place, token in zip(one.rows.places, tokens, strict=True):
        found[place] = token
    asked = one.generation.logprobs
    if asked is None:
        return Drawn(invoke=one.view.invoke, tokens=tuple(found))
    own = slice(start, start + len(tokens))
    told = log_likelihoods(logits_KV[own], tokens_K[own], asked)
    logprobs = [0.0] * count
    likeliest: list[tuple[tuple[int, float], ...]] = [()] * count
    pairs = zip(told.tokens_KC.tolist(), told.likeliest_KC.tolist(), strict=True)
    for place, chosen, best in zip(one.rows.places, told.chosen_K.tolist(), pairs, strict=True):
        logprobs[place] = chosen
        likeliest[place] = tuple(zip(*best, strict=True))
    return Drawn(invoke=one.view.invoke, tokens=tuple(found), logprobs=tuple(logprobs), likeliest=tuple(likeliest))


def drawn_of(states: Sequence[RequestState]) -> dict[RequestId, tuple[Drawn, ...]]:
    """What each request's sequences go on with."""
    return {state.program.request: tuple(state.drawn) for state in states if state.drawn}
