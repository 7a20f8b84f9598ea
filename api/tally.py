"""What a process of the service has counted, kept in a file: so that counts outlive processes, and only grow.

The gateway and the controller have one each; `api.metrics` adds both up for whoever asks. To count costs a lock and an
addition; the file is written at most once a SAVE_S, whole, by a thread that is there only while something is new, and
before anybody is told (`save`). So a process that is killed loses counts that nobody has seen, and none goes back.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SAVE_S = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Something that is counted, by labels. Its name ends with its unit, without `_total`."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Something that is measured, by labels; how many were at most each of `buckets`."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...]


Labels = tuple[str, ...]  # the values, in the order of the names


class Tally:
    """Counts by name and labels. Any thread. `path` None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = {}
        self._spreads: dict[tuple[str, Labels], list[float]] = {}  # sum, then how many fell into each bucket and beyond
        self._saving: threading.Timer | None = None
        self._writing = threading.Lock()
        if path is not None:
            self.add_file(path)

    def count(self, what: Counter, *labels: str, by: float = 1) -> None:
        """So many more."""
        key = what.name, labels
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + by
            self._save_soon()

    def observe(self, what: Histogram, *labels: str, value: float) -> None:
        """One more, of this value."""
        key = what.name, labels
        with self._lock:
            spread = self._spreads.get(key)
            if spread is None or len(spread) != len(what.buckets) + 2:  # another version had other buckets
                spread = self._spreads[key] = [0.0] * (len(what.buckets) + 2)
            spread[0] += value
            spread[1 + bisect_left(what.buckets, value)] += 1
            self._save_soon()

    def counts(self, what: Counter) -> dict[Labels, float]:
        """By labels."""
        with self._lock:
            return {labels: value for (name, labels), value in self._counts.items() if name == what.name}

    def spreads(self, what: Histogram) -> dict[Labels, tuple[float, list[float]]]:
        """By labels: the sum, and how many were at most each bucket, the last of them being all."""
        found: dict[Labels, tuple[float, list[float]]] = {}
        with self._lock:
            for (name, labels), spread in self._spreads.items():
                if name == what.name and len(spread) == len(what.buckets) + 2:
                    so_far, below = 0.0, []
                    for number in spread[1:]:
                        so_far += number
                        below.append(so_far)
                    found[labels] = spread[0], below
        return found

    def add(self, other: Tally) -> None:
        """Adds what another one has counted until now."""
        with other._lock:
            counts = list(other._counts.items())
            spreads = [(key, list(spread)) for key, spread in other._spreads.items()]
        self._add(counts, spreads)

    def add_file(self, path: Path) -> None:
        """Adds what a file of another tally has. One that is missing or spoilt has nothing."""
        try:
            plain = json.loads(path.read_bytes())
            counts = [((str(name), tuple(labels)), float(value)) for name, labels, value in plain["counts"]]
            spreads = [
                ((str(name), tuple(labels)), list(map(float, spread))) for name, labels, spread in plain["spreads"]
            ]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError) as error:
            _log.warning("the counts in %s cannot be read, and begin again: %s", path, error)
            return
        self._add(counts, spreads)

    def save(self) -> None:
        """Writes what is new; on return a process that comes after this one knows it."""
        with self._lock:
            waiting, self._saving = self._saving, None
        if waiting is not None:
            waiting.cancel()
            self._save()

    # --- inside

    def _add(
        self,
        counts: Iterable[tuple[tuple[str, Labels], float]],
        spreads: Iterable[tuple[tuple[str, Labels], list[float]]],
    ) -> None:
        with self._lock:
            for key, value in counts:
                self._counts[key] = self._counts.get(key, 0) + value
            for key, spread in spreads:
                known = self._spreads.get(key)
                if known is not None and len(known) == len(spread):
                    spread = [a + b for a, b in zip(known, spread, strict=True)]
                self._spreads[key] = spread

    def _save_soon(self) -> None:
        if self._saving is None and self._path is not None:
            self._saving = threading.Timer(SAVE_S, self._save)
            self._saving.daemon = True
            self._saving.start()

    def _save(self) -> None:
        assert self._path is not None
        with self._writing:
            with self._lock:
                self._saving = None
                plain = {"counts": _entries(self._counts), "spreads": _entries(self._spreads)}
                text = json.dumps(plain)
            part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
            try:
                part.write_text(text)
                part.replace(self._path)
            except OSError as error:  # a full disk: the counts go on, and are written another time
                _log.warning("the counts could not be written to %s: %s", self._path, error)


def _entries(known: dict[tuple[str, Labels], float] | dict[tuple[str, Labels], list[float]]) -> Iterable[object]:
    return [[name, labels, value] for (name, labels), value in known.items()]
