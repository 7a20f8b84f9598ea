"""The demo: eight users visit a service all at once, every visit is done again by hand, and both are shown."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import polytrace
from bench import pictures
from bench.experiments import EXPERIMENTS, Experiment, Values, patching
from bench.experiments.experiment import FACTS, Answer
from bench.plain import TOLERANCE, Plain, difference
from bench.service import running_service
from polytrace.certificate import Receipt

NAME = "tinyworld"
USERS = ("Ada", "Ben", "Chen", "Dara", "Emre", "Fay", "Goro", "Hana")


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one user did: one experiment, several times with other prompts, all at once."""

    user: str
    experiment: Experiment
    values: tuple[Values, ...]  # per turn
    receipts: tuple[Receipt, ...]  # of all turns
    findings: tuple[str, ...]  # per turn


def run(folder: Path, *, stages: int, ranks: int, turns: int, out: Path, console: Console) -> float:
    """The demo; returns the largest difference to plain Hugging Face."""
    # 1) a service
    with console.status(f"starting {NAME} on {stages} stages x {ranks} ranks") as status:
        service = running_service(
            folder,
            name=NAME,
            stages=stages,
            ranks=ranks,
            log=out / "service.log",
            report=lambda line: status.update(f"starting {NAME} on {stages} stages x {ranks} ranks: {line[:90]}"),
        )
        with service as running:
            console.print(
                f"{NAME} is served by {stages * ranks} shards at {running.url} after {running.start_seconds:.0f} s"
            )
            # 2) eight users at once, each with several experiments of its kind
            status.update(f"{len(EXPERIMENTS)} users, {turns} experiments each, all at once")
            start = time.monotonic()
            visits = visit_all(running.url, turns=turns)
            seconds = time.monotonic() - start
            status.update("stopping the service")
    # 3) the same by hand
    with console.status("doing every experiment again with plain Hugging Face") as status, one_thread():
        plain = Plain(folder)
        differences = []
        for visit in visits:
            status.update(f"doing every experiment again with plain Hugging Face: {visit.experiment.name}")
            differences.append(largest_difference(visit, plain))
    # 4) what there is to see
    console.print(users_table(visits, differences))
    console.print(totals_table(visits, differences, seconds))
    for visit in visits:
        console.print(f"[bold]{visit.user}[/bold], {visit.experiment.name}: {visit.findings[0]}", highlight=False)
    for path in draw(visits, plain, out):
        console.print(f"wrote {path}")
    return max(differences)


def visit_all(url: str, *, turns: int) -> list[Visit]:
    """Every turn of every user in a thread of its own, with a connection of its own; all start at the same moment."""
    together = threading.Barrier(len(EXPERIMENTS) * turns)

    def ask(model: Any, experiment: Experiment, turn: int) -> tuple[Answer, str]:
        together.wait()
        answer = experiment.ask(model, turn)
        return answer, experiment.tell(answer.values, model, turn)

    with ThreadPoolExecutor(len(EXPERIMENTS) * turns) as threads:
        models = [[polytrace.connect(url, NAME) for _ in range(turns)] for _ in EXPERIMENTS]
        asked = [
            [threads.submit(ask, model, experiment, turn) for turn, model in enumerate(own)]
            for own, experiment in zip(models, EXPERIMENTS, strict=True)
        ]
        visits = []
        for user, experiment, futures in zip(USERS, EXPERIMENTS, asked, strict=True):
            answers, findings = zip(*(future.result() for future in futures), strict=True)
            visits.append(
                Visit(
                    user=user,
                    experiment=experiment,
                    values=tuple(answer.values for answer in answers),
                    receipts=tuple(receipt for answer in answers for receipt in answer.receipts),
                    findings=findings,
                )
            )
    return visits


def largest_difference(visit: Visit, plain: Plain) -> float:
    """Over all values of all turns; infinite when a value is missing or token ids differ."""
    worst = 0.0
    for turn, ours in enumerate(visit.values):
        theirs = visit.experiment.check(plain, turn)
        if ours.keys() != theirs.keys():
            return float("inf")
        worst = max(worst, *(difference(ours[name], theirs[name]) for name in theirs))
    return worst


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread: as the shards have, and faster for small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def users_table(visits: Sequence[Visit], differences: Sequence[float]) -> Table:
    """A row for each user."""
    table = Table(
        title="Eight users at once", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("user\n", no_wrap=True)
    table.add_column("experiment\n", no_wrap=True)
    for heading in ("passes\n", "traces\na pass", "tokens\n", "bytes\nreturned", "bytes\nread"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("off from\nplain", justify="right", no_wrap=True)
    for visit, worst in zip(visits, differences, strict=True):
        entries = [entry for receipt in visit.receipts for entry in receipt.passes]
        table.add_row(
            visit.user,
            visit.experiment.name,
            str(len({entry.pass_id for entry in entries})),
            f"{sum(entry.requests for entry in entries) / len(entries):.1f}",
            f"{sum(receipt.tokens for receipt in visit.receipts):,}",
            size(sum(receipt.result_bytes for receipt in visit.receipts)),
            size(sum(receipt.read_bytes for receipt in visit.receipts)),
            f"[{'green' if worst <= TOLERANCE else 'bold red'}]{worst:.1e}",
        )
    return table


def totals_table(visits: Sequence[Visit], differences: Sequence[float], seconds: float) -> Table:
    """The same for all of them together."""
    receipts = [receipt for visit in visits for receipt in visit.receipts]
    passes = {entry.pass_id: entry for receipt in receipts for entry in receipt.passes}
    returned, read = (sum(getattr(receipt, name) for receipt in receipts) for name in ("result_bytes", "read_bytes"))
    rows = {
        "users": f"{len(visits)}, with {len(receipts)} traces in {seconds:.1f} s",
        "passes": f"{len(passes)}",
        "traces per pass": f"{sum(entry.requests for entry in passes.values()) / len(passes):.1f}",
        "tokens": f"{sum(entry.tokens for entry in passes.values()):,}",
        "bytes returned": f"{size(returned)}, of {size(read)} of activations read: 1 in {read / max(returned, 1):,.0f}",
        "largest difference": f"{max(differences):.1e} from plain Hugging Face; {TOLERANCE:.0e} is allowed",
    }
    table = Table(title="All together", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for label, value in rows.items():
        table.add_row(label, value)
    return table


def draw(visits: Sequence[Visit], plain: Plain, out: Path) -> tuple[Path, Path]:
    """The first turn's logit lens and patching map."""
    by_name: dict[str, Visit] = {visit.experiment.name: visit for visit in visits}
    lens, patched = by_name["logit lens"].values[0], by_name["patching"].values[0]
    paths = out / "logit_lens.png", out / "patching.png"
    pictures.draw_logit_lens(
        paths[0],
        tokens=[plain.text([token]) for token in plain.ids(FACTS[0][0])],
        guesses=[[plain.text([token]) for token in row] for row in lens["tokens"].tolist()],
        probabilities=lens["probabilities"].tolist(),
    )
    clean, corrupt, _, _ = patching.patching_pair(plain.ids, 0)
    above, below = ([plain.text([token]) for token in plain.ids(prompt)] for prompt in (clean, corrupt))
    pictures.draw_patching(
        paths[1],
        tokens=[a if a == b else f"{a.strip()} / {b.strip()}" for a, b in zip(above, below, strict=True)],
        restored=patching.restored_share(patched).tolist(),
        clean=clean,
        corrupt=corrupt,
    )
    return paths


def size(num_bytes: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"
