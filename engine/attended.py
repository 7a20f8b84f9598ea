"""Everything that a row may look at: keys or values of all positions of its sequence, those of earlier steps too.

Behind step 0 a pass has one row of a sequence. What stands before it is read where it lies: in a cache, in one that
several sequences have in common, or in the stream where it runs again.
"""

from __future__ import annotations

from torch import Tensor

from engine.streams import Stream
from engine.trunks import Trunks
from polytrace.graph import Port
from scheduling.plan import NO_ROWS, View

# T = packed rows, G = key/value heads here, C = head dimension


class Attended:
    """Keys or values of one layer, during a visit."""

    def __init__(self, own_1TGC: Tensor, port: Port, layer: int, stream: Stream, trunks: Trunks) -> None:
        """`own_1TGC` are those of this pass, whose rows `stream` has, behind everything that was written to them."""
        self._own_TGC = own_1TGC[0]
        self._is_values = port is Port.VALUES
        self._layer, self._stream, self._trunks = layer, stream, trunks

    def read(self, view: View, before: int) -> Tensor:
        """`[sequences, before + longest, G, C]`, a copy, left-padded with zeros; who has ended reads zeros.

        `before`: positions of the longest sequence before the view's columns.
        """
        own, stream = self._own_TGC, self._stream
        width = before + max(view.lengths)
        out = own.new_zeros(len(view.lengths), width, *own.shape[1:])
        for place, (segment, begin, length) in enumerate(zip(view.segments, view.begins, view.lengths, strict=True)):
            if segment == NO_ROWS:
                continue
            pads = width - begin - length
            for owner, first, last in stream.owners(segment, 0, begin + length):
                out[place, pads + first : pads + last] = self._of(owner, first, last)
        return out

    def _of(self, owner: int, first: int, last: int) -> Tensor:
        """`[last - first, G, C]` of a segment's own positions."""
        stream, segment = self._stream, self._stream.segments[owner]
        if segment.trunk is None:
            row = stream.bases[owner] - stream.starts[owner]
            return self._own_TGC[row + first : row + last]
        kept_GRC = self._trunks.kept(segment, self._layer, self._own_TGC.dtype)[self._is_values]
        start = stream.starts[owner]
        return kept_GRC[:, first - start : last - start].transpose(0, 1)
