"""docs/families.md, from trials."""

from __future__ import annotations

from collections.abc import Sequence

from bench.families.trial import Trial
from polytrace.points import DIMS


def page(trials: Sequence[Trial]) -> str:
    rows = [row(trial) for trial in sorted(trials, key=lambda trial: trial.name.lower())]
    return "\n".join(rows)


def row(trial: Trial) -> str:
    """One line of the table."""
    missing = [name for name in DIMS if name not in trial.points]
    cells = (
        trial.name,
        ", ".join(dict.fromkeys(trial.families)),
        (trial.layout or "-") if trial.is_green else "-",
        ", ".join(trial.standard),
        "all" if not missing else f"all but {', '.join(missing)}",
        "2" if trial.has_stages else "1",
        "2" if trial.has_ranks else "1",
        "; ".join(trial.notes),
    )
    return f"| {' | '.join(cells)} |"
