"""From what every shard's checks of names found to what a description says: what holds, and names that are withdrawn.

A name that a check blames has no tensor any more, in the layers where it failed, and the reason is what its user is
told. Where only its edit fails it can still be read. What no check could be made of stays, and that is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from engine.relations import Check
from polytrace.description import Checked, ModelDescription, Outcome, PointInfo, SiteInfo

_WORST = (Outcome.FAILS, Outcome.UNCHECKED, Outcome.HOLDS)
_Withdrawn = Mapping[tuple[int | None, str], Check]


def with_checks(description: ModelDescription, checks: Iterable[Check]) -> ModelDescription:
    """The description with what all shards' checks say of its names."""
    told = list(_alike(list(_together(checks))))
    withdrawn: dict[tuple[int | None, str], Check] = {}
    read_only: dict[tuple[int | None, str], Check] = {}
    for check in told:
        if check.outcome is Outcome.FAILS:
            for name in check.blames:
                (read_only if check.is_of_writing else withdrawn).setdefault((check.layer, name), check)
    gone = {name: _reason(withdrawn[None, name]) for name in description.standard if (None, name) in withdrawn}
    changed = replace(
        description,
        points=tuple(_point(point, description, withdrawn, read_only) for point in description.points),
        sites=tuple(_site(site, description, withdrawn, read_only) for site in description.sites),
        standard={name: path for name, path in description.standard.items() if name not in gone},
        not_standard={**description.not_standard, **gone},
        checked=tuple(_folded(told)),
    )
    if changed.sites == description.sites and changed.points == description.points:
        return changed
    told_of = repr([(key, _reason(check)) for key, check in sorted((withdrawn | read_only).items(), key=repr)])
    mark = hashlib.sha256((description.fingerprint + told_of).encode()).hexdigest()[:16]
    return replace(changed, fingerprint=mark)


def _together(checks: Iterable[Check]) -> Iterator[Check]:
    """What the ranks of a stage say of the same relation: the worst of it."""
    found: dict[tuple[int | None, tuple[str, ...], str], list[Check]] = {}
    for check in checks:
        found.setdefault((check.layer, check.names, check.says), []).append(check)
    for same in found.values():
        worst = min(same, key=lambda check: _WORST.index(check.outcome))
        errors = [check.error for check in same if check.error is not None and check.outcome is worst.outcome]
        yield replace(worst, error=max(errors, default=None))


def _alike(checks: Sequence[Check]) -> Iterator[Check]:
    """Layers in which the same fails say of it what the worst of them does."""
    worst: dict[tuple[tuple[str, ...], str], Check] = {}
    for check in checks:
        if check.outcome is Outcome.FAILS:
            known = worst.setdefault((check.names, check.says), check)
            if (check.error or 0.0) > (known.error or 0.0):
                worst[check.names, check.says] = check
    for check in checks:
        same = worst.get((check.names, check.says))
        yield check if check.outcome is not Outcome.FAILS or same is None else replace(check, told=same.told)


def _reason(check: Check) -> str:
    told = f" ({check.told})" if check.told else ""
    return f"withdrawn at load, where on the served weights it did not hold that {check.says}{told}"


def _point(point: PointInfo, description: ModelDescription, withdrawn: _Withdrawn, read_only: _Withdrawn) -> PointInfo:
    if point.site is None:
        return point
    key = _layer(point.site.module, description), point.name
    if key in withdrawn:
        return replace(point, site=None, refusal=_reason(withdrawn[key]))
    if key in read_only:
        return replace(point, write_refusal=_reason(read_only[key]))
    return point


def _site(site: SiteInfo, description: ModelDescription, withdrawn: _Withdrawn, read_only: _Withdrawn) -> SiteInfo:
    if not site.port.is_inner:
        return site
    key = _layer(site.module, description), site.port.value
    if key in withdrawn:
        reason = _reason(withdrawn[key])
        leaves = (replace(leaf, read_refusal=reason, write_refusal=reason) for leaf in site.leaves)
        return replace(site, leaves=tuple(leaves))
    if key in read_only:
        reason = _reason(read_only[key])
        return replace(site, leaves=tuple(replace(leaf, write_refusal=reason) for leaf in site.leaves))
    return site


def _layer(path: str, description: ModelDescription) -> int | None:
    rest = path.removeprefix(f"{description.layers}.")
    return int(rest.partition(".")[0]) if rest != path else None


def _folded(checks: Sequence[Check]) -> Iterator[Checked]:
    """Layers of which the same is said are told once."""
    same: dict[tuple[tuple[str, ...], str, Outcome, str | None], list[Check]] = {}
    for check in checks:
        told = None if check.outcome is Outcome.HOLDS else check.told
        same.setdefault((check.names, check.says, check.outcome, told), []).append(check)
    for (names, says, outcome, told), own in same.items():
        errors = [check.error for check in own if check.error is not None]
        yield Checked(
            names=names,
            says=says,
            outcome=outcome,
            layers=tuple(sorted(check.layer for check in own if check.layer is not None)),
            error=max(errors, default=None),
            told=told if told is not None else next((check.told for check in own if check.told is not None), None),
        )
