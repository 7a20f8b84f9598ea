"""What a model has of the standard names, and what was checked of each when it was loaded: a table, and data.

Works from the description alone, so it is the same in this process and over HTTP. `print(model.support())` shows it;
`support["resid_mid"]` is a name's rows, `support.failing` what does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from polytrace.description import Checked, Leaf, ModelDescription, Outcome
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.graph import Site
from polytrace.lines import user_line
from polytrace.points import DIMS, owners
from polytrace.tree import Table

_ROOT = ""
_OUTCOMES = {Outcome.HOLDS: "holds", Outcome.UNCHECKED: "not checked", Outcome.FAILS: "FAILS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A name, in the layers where the same is true of it."""

    name: str
    layers: tuple[int, ...]  # ascending; none: of the model
    where: str | None  # the tensor, or the module, that it is; paths are below the layer; None where it is none
    dims: tuple[str, ...]
    sizes: tuple[int | None, ...]  # as many; None: it depends on the prompts
    is_readable: bool
    is_writable: bool
    why_not: str | None  # why it cannot be read, or not be written
    note: str | None  # what people have to know of it in this family
    checked: tuple[Checked, ...]

    @property
    def holds(self) -> tuple[str, ...]:
        """What was borne out by the served weights."""
        return tuple(check.says for check in self.checked if check.outcome is Outcome.HOLDS)

    @property
    def not_checked(self) -> tuple[str, ...]:
        """What could not be checked, each with the reason."""
        return tuple(_with_reason(check) for check in self.checked if check.outcome is Outcome.UNCHECKED)

    @property
    def fails(self) -> tuple[str, ...]:
        """What the served weights refuted, each with the reason."""
        return tuple(_with_reason(check) for check in self.checked if check.outcome is Outcome.FAILS)


class Support(Sequence[Row]):
    """Rows by name, in the order of a forward. Printed, the table."""

    def __init__(self, description: ModelDescription, rows: Iterable[Row]) -> None:
        self.description = description
        self.rows = tuple(rows)

    def __getitem__(self, key: int | slice | str) -> tuple[Row, ...] | Row:  # type: ignore[override]
        """The rows of a name, or by number."""
        if not isinstance(key, str):
            return self.rows[key]
        found = tuple(row for row in self.rows if row.name == key)
        if not found:
            names = [row.name for row in self.rows]
            raise GraphError(f"{key!r} is no standard name{nearest(key, names)}", where=user_line())
        return found

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def failing(self) -> tuple[Checked, ...]:
        """Everything that did not hold."""
        return tuple(check for check in self.description.checked if check.outcome is Outcome.FAILS)

    @property
    def unchecked(self) -> tuple[Checked, ...]:
        """Everything that could not be checked, with the reasons in `told`."""
        return tuple(check for check in self.description.checked if check.outcome is Outcome.UNCHECKED)

    def records(self) -> list[dict[str, object]]:
        """Plain rows, as `pandas.DataFrame` takes them."""
        return [
            {
                "name": row.name,
                "layers": _span(row.layers),
                "where": row.where,
                "dims": _dims(row),
                "read": row.is_readable,
                "write": row.is_writable,
                "why_not": row.why_not,
                "note": row.note,
                "holds": row.holds,
                "not_checked": row.not_checked,
                "fails": row.fails,
            }
            for row in self.rows
        ]

    def __repr__(self) -> str:
        head = ("name", "layers", "where", "dimensions", "read", "write")
        cells = [
            (row.name, _span(row.layers), row.where or "-", _dims(row), _yes(row.is_readable), _yes(row.is_writable))
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = [_line(head, widths)]
        for row, own in zip(self.rows, cells, strict=True):
            lines += [_line(own, widths), *(f"    {told}" for told in _told(row))]
        description = self.description
        first = (
            f"{description.class_name}, {description.num_layers} layers, {description.dtype}, on "
            f"{description.stages} x {description.ranks} shards (stages x ranks); checked on the served weights at load"
        )
        return "\n".join([first, *lines])


def support_of(table: Table) -> Support:
    """The table of a model."""
    description = table.description
    alone = [*_standard(table, ("embed_tokens",)), *_points(table, _ROOT, None)]
    layers = f"{description.layers}."
    in_layers = [row for number in range(description.num_layers) for row in _points(table, f"{layers}{number}", number)]
    behind = list(_standard(table, ("ln_final", "lm_head")))
    order = {name: place for place, name in enumerate(DIMS)}
    folded = sorted(_folded(in_layers), key=lambda row: (order[row.name], row.layers))
    rows = [*alone, *folded, *behind]
    return Support(description, (replace(row, checked=tuple(_checked(row, description))) for row in rows))


def _standard(table: Table, names: Iterable[str]) -> Iterator[Row]:
    for name in names:
        path = table.description.standard.get(name)
        why_not = table.description.not_standard.get(name, "the model has no such module") if path is None else None
        yield Row(
            name=name,
            layers=(),
            where=path,
            dims=(),
            sizes=(),
            is_readable=path is not None,
            is_writable=path is not None,
            why_not=why_not,
            note=None,
            checked=(),
        )


def _points(table: Table, path: str, layer: int | None) -> Iterator[Row]:
    """The points of the model, or of a layer and what is inside it."""
    if path not in table.modules:
        return
    for name, owner in owners(table, path).items():
        info = table.points.get(owner, {}).get(name)
        found = table.ports.get((owner, name)) if info is None else None
        site: Site | None = None
        leaf: Leaf | None = None
        if info is not None and info.site is not None and info.refusal is None:
            own = table.ports[info.site.module, info.site.port.value]
            site, leaf = own.leaves[info.site.selector]
        elif found is not None:
            site, leaf = next(iter(found.leaves.values()))
        refusal = info.refusal if info is not None else None
        refusal = refusal or (leaf.read_refusal if leaf is not None else "it is no tensor of this forward")
        read_only = (info.write_refusal if info is not None else None) or (leaf.write_refusal if leaf else None)
        why_not = refusal or read_only
        yield Row(
            name=name,
            layers=() if layer is None else (layer,),
            where=None if site is None else _where(site, path),
            dims=DIMS[name],
            sizes=_sizes(DIMS[name], leaf),
            is_readable=refusal is None,
            is_writable=why_not is None,
            why_not=why_not.replace(f"{path}.", "") if why_not and path else why_not,
            note=None if info is None else info.note,
            checked=(),
        )


def _where(site: Site, path: str) -> str:
    module = site.module.removeprefix(path).removeprefix(".") if path else site.module
    way = "".join(f"[{part!r}]" for part in site.selector)
    return f"{module}.{site.port.value}{way}".removeprefix(".")


def _sizes(dims: tuple[str, ...], leaf: Leaf | None) -> tuple[int | None, ...]:
    if leaf is None:
        return (None,) * len(dims)
    if leaf.of_pairs:
        return (None, *leaf.tail, None, None)
    return (None, None, *leaf.tail)


def _folded(rows: Iterable[Row]) -> Iterator[Row]:
    """Layers of which the same is true are one row."""
    same: dict[Row, list[int]] = {}
    for row in rows:
        same.setdefault(replace(row, layers=()), []).extend(row.layers)
    for row, layers in same.items():
        yield replace(row, layers=tuple(layers))


def _checked(row: Row, description: ModelDescription) -> Iterator[Checked]:
    for check in description.checked:
        is_here = not row.layers or not check.layers or set(check.layers) & set(row.layers)
        if row.name in check.names and is_here:
            yield check


def _told(row: Row) -> Iterator[str]:
    if row.why_not is not None:
        yield f"{'cannot be written' if row.is_readable else 'not here'}: {row.why_not}"
    if row.note is not None:
        yield f"note: {row.note}"
    everywhere = [check for check in row.checked if check.outcome is Outcome.HOLDS and _covers(check, row)]
    if everywhere:
        yield f"holds: {'; '.join(_says(check) for check in everywhere)}"
    for check in row.checked:
        is_said = row.why_not is not None and row.why_not in (check.told or "")
        if check not in everywhere and not is_said:
            where = "" if _covers(check, row) else f" (layers {_span(check.layers)})"
            told = _says(check) if check.outcome is Outcome.HOLDS else _with_reason(check)
            yield f"{_OUTCOMES[check.outcome]}{where}: {told}"


def _covers(check: Checked, row: Row) -> bool:
    return not check.layers or set(row.layers) <= set(check.layers)


def _says(check: Checked) -> str:
    return check.says if check.told is None else f"{check.says} ({check.told})"


def _with_reason(check: Checked) -> str:
    return check.says if check.told is None else f"{check.says}: {check.told}"


def _dims(row: Row) -> str:
    named = (dim if size is None else f"{dim} {size}" for dim, size in zip(row.dims, row.sizes, strict=False))
    return f"[{', '.join(named)}]" if row.dims else "a module"


def _span(layers: Sequence[int]) -> str:
    """`0-3, 5`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) or "-"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
