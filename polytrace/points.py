"""Named points: the same words for the same tensors in every family, with names for their dimensions.

They are on the module that has them (`layer.resid_mid`, `attention.q`, `mlp.mlp_post`), and those of what is inside a
decoder layer on the layer too (`layer.q`), so that a loop over layers need not know what a family calls its modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from polytrace.description import PointInfo
from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.tree import PortTable, Table

_STREAM = ("sequence", "token", "feature")
_HEADS = ("sequence", "token", "head", "feature")
_ATTENDED = ("sequence", "position", "head", "feature")
_PAIRS = ("sequence", "head", "query", "key")
DIMS: dict[str, tuple[str, ...]] = {
    "input_ids": ("sequence", "token"),  # of the whole model, as are
    "token_embeddings": _STREAM,  # what the embedding gives
    "logits": ("sequence", "token", "vocabulary"),
    "resid_pre": _STREAM,  # what a layer takes
    "q": _HEADS,  # before norms of their own and rotation, as are k
    "k": _HEADS,
    "v": _HEADS,
    "q_rot": _HEADS,
    "k_rot": _HEADS,
    "keys": _ATTENDED,  # k_rot and v of all positions so far
    "values": _ATTENDED,
    "scores": _PAIRS,
    "pattern": _PAIRS,
    "z": _HEADS,
    "head_out": _HEADS,  # features of the residual
    "attention_input": _STREAM,  # what the module that attends is given
    "attention_output": _STREAM,  # the hidden states that it gives
    "attention_added": _STREAM,  # what is added to the residual: behind a norm where a family has one there
    "resid_mid": _STREAM,  # between attention and MLP
    "router": ("sequence", "token", "expert"),
    "mlp_pre": ("sequence", "token", "neuron"),  # what the activation takes
    "mlp_post": ("sequence", "token", "neuron"),  # what is projected back
    "mlp_input": _STREAM,
    "mlp_output": _STREAM,
    "mlp_added": _STREAM,
    "resid_post": _STREAM,  # what a layer gives
}


class Points(Mapping[str, tuple[str, ...]]):
    """The named points of a module with the names of their dimensions; printed, also those that it cannot have."""

    def __init__(self, table: Table, path: str) -> None:
        self._table = table
        self._owners = owners(table, path)

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if name not in self._owners or self._refusal(name) is not None:
            raise KeyError(name)
        return DIMS[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._owners if self._refusal(name) is None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return "\n".join(self._line(name) for name in self._owners)

    def _line(self, name: str) -> str:
        info = self._info(name)
        if info is not None and info.refusal is not None:
            return f"{name}: not here, {info.refusal}"
        note = f"; {info.note}" if info is not None and info.note is not None else ""
        return f"{name}: [{', '.join(DIMS[name])}]{note}"

    def _info(self, name: str) -> PointInfo | None:
        return self._table.points.get(self._owners[name], {}).get(name)

    def _refusal(self, name: str) -> str | None:
        info = self._info(name)
        return None if info is None else info.refusal


def owners(table: Table, path: str) -> dict[str, str]:
    """Names of points and the modules that have them: of a module its own, of a decoder layer those inside it too."""
    module = table.modules[path]
    inside = [path]
    if module.is_decoder_layer:
        inside += table.inside_layers.get(path, ())
    found: dict[str, str] = {}
    for name in DIMS:
        for owner in inside:
            if name in table.points.get(owner, {}) or (owner, name) in table.ports:
                found.setdefault(name, owner)
    return found


def point_table(table: Table, owner: str, name: str) -> PortTable | None:
    """The tensor behind a name, as one side of a module; None when the module has no such name."""
    info = table.points.get(owner, {}).get(name)
    if info is None:
        return table.ports.get((owner, name)) if name in DIMS else None
    if info.site is None or info.refusal is not None:
        raise GraphError(f"{owner or 'the model'} has no {name}: {info.refusal}", where=user_line())
    port = table.ports[info.site.module, info.site.port.value]
    site, leaf = port.leaves[info.site.selector]
    if info.write_refusal is not None:
        leaf = replace(leaf, write_refusal=info.write_refusal, in_place_refusal=info.write_refusal)
    return PortTable(
        info=port.info,
        is_layer_output=False,
        leaves={(): (site, leaf)},
        dims=DIMS.get(name, DIMS.get(info.site.port.value)),
        is_stream=name == "resid_mid",
        is_dropout_input=name == Port.INPUT.value,
    )
