"""The commands that look at a machine and a service: `polytrace doctor` and `polytrace top`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from api.asking import HERE, AsJson, Key, Url
from api.console import errors
from api.service_calls import Service


def doctor(
    machine_only: Annotated[bool, typer.Option("--machine", help="Only this machine: no service runs yet.")] = False,
    store: Annotated[Path, typer.Option(help="Folder that a service's store is in, or will be.")] = Path("."),
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Check this machine and a running service; each finding says what to do. Exit code 1 when something fails."""
    with errors():
        from api.doctor import Finding, Grade, machine_findings, service_findings, worst

        found: list[Finding] = []
        sources = [machine_findings(store)]
        if not machine_only:
            sources.append(service_findings(Service(url, key), url))
        for source in sources:
            for one in source:
                found.append(one)
                if as_json:
                    told = {"grade": one.grade.value, "what": one.what, "told": one.told, "next": one.next_step}
                    print(json.dumps(told), flush=True)
                    continue
                print(f"{one.grade.value:4}  {one.what}: {one.told}", flush=True)
                if one.next_step and one.grade is not Grade.OK:
                    print(f"      -> {one.next_step}", flush=True)
    if worst(found) is Grade.FAIL:
        raise typer.Exit(1)


def top(
    once: Annotated[bool, typer.Option("--once", help="Measure once, print and end.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds that are measured.")] = 2.0,
    as_json: AsJson = False,
    url: Url = HERE,
    key: Key = None,
) -> None:
    """Show queues, rates, users per pass, what sharing saves and who uses most, from /metrics. For operators."""
    with errors():
        from rich.console import Console
        from rich.live import Live

        from api.top import Sample, Top, rendered

        service = Service(url, key)

        def sample() -> Sample:
            return Sample.of(service.text("/metrics"), time.monotonic())

        before = sample()
        if once or as_json:
            time.sleep(every)
            found = Top.between(before, sample())
            print(json.dumps(found.plain())) if as_json else Console(width=None if sys.stdout.isatty() else 160).print(
                rendered(found)
            )
            return
        with Live(auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(every)
                now = sample()
                live.update(rendered(Top.between(before, now)), refresh=True)
                before = now
