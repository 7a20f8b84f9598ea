"""Where a model keeps what TransformerLens's blocks have: attention, MLP, norms. Told from the model's description.

Structure alone: a norm is what comes before attention, between it and the MLP, or behind the MLP, and what takes the
residual between them (`resid_mid`) is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polytrace.errors import GraphError
from polytrace.graph import Port
from polytrace.lines import user_line
from polytrace.model import Model
from polytrace.points import owners
from polytrace.tree import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Paths of one decoder layer's modules; None where it has no such."""

    path: str
    attention: str
    mlp: str | None  # whose output the MLP's is; the projection back where the layer itself holds the neurons
    ln1: str | None = None
    ln2: str | None = None
    ln1_post: str | None = None  # norms what attention gave before it is added
    ln2_post: str | None = None
    is_parallel: bool = False  # attention and MLP both read resid_pre
    has_one_norm: bool = False  # ... through the same norm


def find_blocks(model: Model) -> tuple[Block, ...]:
    """The blocks of a model. Raises GraphError for a layer without attention that polytrace knows."""
    table = model._index
    paths = (f"{table.description.layers}.{number}" for number in range(table.description.num_layers))
    return tuple(_find(table, path) for path in paths)


def positions_of(model: Model) -> str | None:
    """The module that embeds positions, where there is one."""
    known = model._index.parameters.get("W_pos")
    return None if known is None or known.of is None else known.of.rpartition(".")[0]


def linear_of(model: Model, block: Block) -> str | None:
    """In a gated MLP, the module whose output the gate is multiplied with, where it gives nothing else."""
    table = model._index
    names = table.layer_weights.get(block.path, {})
    parameter = table.parameters[names["W_in"]] if {"W_in", "W_gate"} <= names.keys() else None
    if parameter is None or parameter.of is None:
        return None
    path = parameter.of.rpartition(".")[0]
    port = table.ports.get((path, Port.OUTPUT.value))
    leaf = None if port is None or () not in port.leaves else port.leaves[()][1]
    return path if leaf is not None and leaf.tail == parameter.shape[-1:] else None


def _find(table: Table, path: str) -> Block:
    own = owners(table, path)
    attention = own.get("z")
    if attention is None:
        raise GraphError(
            f"{path} has no attention that polytrace knows, so names and edges of heads are not for this model",
            where=user_line(),
        )
    mlp = own.get("mlp_post", own.get("router"))
    info = table.points.get(mlp or "", {}).get("mlp_post")
    if mlp == path:  # the layer itself has the neurons: its projection back
        mlp = None if info is None or info.site is None else info.site.module
    if mlp is None:
        mlp = _last(table, path, attention)
    middle = table.points.get(path, {}).get("resid_mid")
    taker = None if middle is None or middle.site is None else middle.site.module
    before, between, behind = _norms(table, path, attention, mlp)
    part = table.parts.get((path, "mlp"))
    if part is not None and part.is_parallel:
        several = [*before, *between]
        ln1 = several[0] if several else None
        return Block(
            path=path,
            attention=attention,
            mlp=mlp,
            ln1=ln1,
            ln2=several[1] if len(several) > 1 else ln1,
            is_parallel=True,
            has_one_norm=len(several) == 1,
        )
    posts = [norm for norm in between if norm != taker]
    has_norm_before = taker in between
    ln1_post, ln2_post, first = (own[0] if own else None for own in (posts, behind, before))
    is_behind_alone = not before and not has_norm_before  # norms stand behind attention and MLP only: they are ln1, ln2
    return Block(
        path=path,
        attention=attention,
        mlp=mlp,
        ln1=ln1_post if is_behind_alone else first,
        ln2=ln2_post if is_behind_alone else taker if has_norm_before else None,
        ln1_post=None if is_behind_alone else ln1_post,
        ln2_post=None if is_behind_alone else ln2_post,
    )


def _norms(table: Table, path: str, attention: str, mlp: str | None) -> tuple[list[str], list[str], list[str]]:
    """The layer's own norms: before attention, between it and the MLP, behind that."""
    norms = [join for join in _children(table, path) if "norm" in table.modules[join].class_name.lower()]
    first, last = _order(table, attention, Port.INPUT), _order(table, attention, Port.OUTPUT)
    given = _order(table, mlp, Port.OUTPUT) if mlp is not None else last
    places = sorted((_order(table, norm, Port.INPUT), norm) for norm in norms if (norm, "input") in table.ports)
    return (
        [norm for place, norm in places if place < first],
        [norm for place, norm in places if last < place < given],
        [norm for place, norm in places if place > given],
    )


def _last(table: Table, path: str, attention: str) -> str | None:
    """The last child of the layer behind attention that is no norm and no dropout: an MLP without names."""
    last = _order(table, attention, Port.OUTPUT)
    found = [
        (_order(table, child, Port.OUTPUT), child)
        for child in _children(table, path)
        if (child, "output") in table.ports
        and not any(word in table.modules[child].class_name.lower() for word in ("norm", "dropout"))
    ]
    behind = [pair for pair in found if pair[0] > last]
    return max(behind)[1] if behind else None


def _children(table: Table, path: str) -> Iterator[str]:
    return (f"{path}.{name}" for name in table.children.get(path, ()))


def _order(table: Table, path: str, port: Port) -> int:
    """Where in the forward a side of a module is."""
    return table.ports[path, port.value].info.order
