"""One class, tried: loaded, read, edited and merged against plain Hugging Face, then over two stages and two ranks."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers
from torch import Tensor

import polytrace
from bench.families.configurations import classes, tiny_config, tiny_model
from bench.families.gang import Workers, gang
from bench.families.oracle import TOLERANCE, Seen, attentions_of, differing, is_causal, leaf_of, run_plain
from polytrace.description import ModelDescription
from polytrace.errors import PolytraceError
from polytrace.model import Model
from polytrace.points import DIMS, owners, point_table
from polytrace.tree import index_description

PROMPTS = ([3, 7, 5, 2, 9, 1, 4], [8, 11, 6, 2, 13])
_EFFECT = 1e-3  # that an edit has at least


@dataclass(slots=True, kw_only=True)
class Trial:
    """What came of it. Nothing here depends on the machine or the day."""

    name: str  # of the class
    families: tuple[str, ...]  # model types
    layout: str | None = None  # None: it is not served
    standard: tuple[str, ...] = ()
    points: tuple[str, ...] = ()  # that at least one layer has
    is_green: bool = False
    has_stages: bool = False
    has_ranks: bool = False
    notes: list[str] = field(default_factory=list)  # why not


def try_class(name: str, workers: Workers) -> Trial:
    """Never raises for what the class is like: that is in the notes."""
    trial = Trial(name=name, families=tuple(config.model_type for config in classes()[name]))
    with _noting(trial, "no tiny model"):
        plain = tiny_model(name, tiny_config(name))
        if not is_causal(plain, PROMPTS[0]):
            trial.notes.append("not causal: a later token moves an earlier one")
            return trial
        seen = [run_plain(plain, ids) for ids in PROMPTS]
        with tempfile.TemporaryDirectory(prefix="polytrace-family-") as folder:
            _save(plain, name, folder)
            _try(trial, plain, seen, folder, workers)
    return trial


def answer(pipe: Connection, name: str) -> None:
    """In a process of its own, which leads the group of all processes that it starts."""
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    workers = Workers(4)  # two stages and two ranks
    pipe.send(try_class(name, workers))
    workers.close()


def _try(trial: Trial, plain: Any, seen: list[Seen], folder: str, workers: Workers) -> None:
    with _noting(trial, ""), polytrace.load(folder, threads=1) as model:
        description = model.backend.describe()
        trial.layout = description.layout.value
        trial.standard = tuple(sorted(description.standard))
        trial.points = _points(model)
        alone = _read_all(trial, model, seen)
        if alone is not None:
            _edit(trial, model, plain, seen)
            _merge(trial, model, alone)
            _patterns(trial, model, plain)
            trial.is_green = not trial.notes
    if not trial.is_green or alone is None:
        return
    with _noting(trial, "stages"):
        trial.has_stages = _split(trial, workers, folder, alone, stages=2, ranks=1)
    with _noting(trial, "ranks"):
        trial.has_ranks = _split(trial, workers, folder, alone, stages=1, ranks=2)


def _read_all(trial: Trial, model: Model, seen: list[Seen]) -> list[Tensor] | None:
    """Every site that can be read, of each prompt, against hooks. Returns logits and layers' outputs."""
    description = model.backend.describe()
    saved: list[list[tuple[str, Any, Any]]] = []
    kept: list[Any] = []
    with model.trace() as tracer:
        for number, ids in enumerate(PROMPTS):
            saved.append([])
            with tracer.invoke(ids):
                for path, side, leaf in _leaves(description):
                    expected = leaf_of(seen[number].calls, path, side, leaf)
                    if expected is not None:
                        value = getattr(model.get_submodule(path), side)
                        for step in leaf.selector:
                            value = value[step]
                        if expected.is_complex():  # complex values do not travel
                            value, expected = torch.view_as_real(value), torch.view_as_real(expected)
                        saved[-1].append((f"{path}.{side}", value.save(), expected))
                kept.extend(_results(model))
    for found in saved:
        for place, ours, plain in found:
            if not differing(ours, plain) <= TOLERANCE:
                trial.notes.append(f"{place} is not plain Hugging Face's")
                return None
    return kept


def _results(model: Model) -> list[Any]:
    """Logits and every layer's output of the prompt that is being recorded."""
    return [model.output.logits.save(), *(layer.resid_post.save() for layer in _layers(model))]


def _edit(trial: Trial, model: Model, plain: Any, seen: list[Seen]) -> None:
    path = f"{model.backend.describe().layers}.0"
    width = int(seen[0].calls[path, "input"].shape[-1])
    vector = torch.linspace(-1.0, 1.0, width)
    with model.trace(PROMPTS[0]):
        _layers(model)[0].output[0][:, -1] += vector
        logits = model.output.logits.save()
    expected = run_plain(plain, PROMPTS[0], path, vector).logits
    if differing(expected, seen[0].logits) < _EFFECT:
        trial.notes.append("an edit of the first layer has no effect")
    elif not differing(logits, expected) <= TOLERANCE:
        trial.notes.append("an edit of the first layer is not the hook's")


def _merge(trial: Trial, model: Model, merged: list[Tensor]) -> None:
    alone: list[Any] = []
    for ids in PROMPTS:
        with model.trace(ids):
            alone.extend(_results(model))
    if not all(map(torch.equal, alone, merged)):
        trial.notes.append("a prompt has other bits beside another one than alone")


def _patterns(trial: Trial, model: Model, plain: Any) -> None:
    """What rows attend to, against what the model tells; where it tells nothing, earlier tokens alone and at most 1."""
    attending = [layer for number, layer in enumerate(_layers(model)) if "pattern" in _readable(model, number)]
    if not attending:
        return
    with model.trace(PROMPTS[0]):
        patterns = [layer.pattern.save() for layer in attending]
    told = attentions_of(plain, PROMPTS[0])
    if len(told) == len(patterns):
        is_right = all(
            differing(_shares(ours), _shares(own)) <= TOLERANCE for ours, own in zip(patterns, told, strict=True)
        )
    else:
        is_right = all(
            float(own.sum(-1).max()) <= 1 + TOLERANCE and float(own.triu(1).abs().max()) == 0.0 for own in patterns
        )
    if not is_right:
        trial.notes.append("attention patterns are not plain Hugging Face's")


def _shares(pattern: Tensor) -> Tensor:
    """Of the weight that a row gives to tokens: some families tell it without what an attention sink takes."""
    return pattern / pattern.sum(-1, keepdim=True)


def _split(trial: Trial, workers: Workers, folder: str, alone: list[Tensor], *, stages: int, ranks: int) -> bool:
    found: list[Any] = []
    with gang(workers, folder, stages=stages, ranks=ranks) as model, model.trace() as tracer:
        for ids in PROMPTS:
            with tracer.invoke(ids):
                found.extend(_results(model))
    is_same = all(differing(ours, own) <= TOLERANCE for ours, own in zip(found, alone, strict=True))
    if not is_same:
        trial.notes.append(f"{'stages' if stages > 1 else 'ranks'}: other numbers than one process")
    elif stages > 1 and not all(map(torch.equal, found, alone)):
        trial.notes.append("stages: the numbers of one process but for rounding, by another formula of its attention")
    return is_same


def _leaves(description: ModelDescription) -> Iterator[tuple[str, str, Any]]:
    for site in description.sites:
        if site.visit == 0 and site.port.value in ("input", "output"):
            for leaf in site.leaves:
                if leaf.read_refusal is None and not leaf.of_pairs:
                    yield site.module, site.port.value, leaf


def _points(model: Model) -> tuple[str, ...]:
    description = model.backend.describe()
    found = {name for number in range(len(_layers(model))) for name in _readable(model, number)}
    found |= {point.name for point in description.points if not point.module and point.refusal is None}
    return tuple(name for name in DIMS if name in found)


def _readable(model: Model, number: int) -> list[str]:
    """The named points of a layer that a trace can read."""
    description = model.backend.describe()
    path = f"{description.layers}.{number}"
    table = index_description(description)
    found = []
    for name, owner in owners(table, path).items():
        info = table.points.get(owner, {}).get(name)
        port = None if info is not None and info.site is None else point_table(table, owner, name)
        if port is not None and all(leaf.read_refusal is None for _, leaf in port.leaves.values()):
            found.append(name)
    return found


def _layers(model: Model) -> list[Any]:
    return list(model.get_submodule(model.backend.describe().layers))


def _save(plain: Any, name: str, folder: str) -> None:
    """As a checkpoint that leads back to the class."""
    plain.save_pretrained(folder)
    if type(plain.config) not in classes()[name]:
        tiny_config(name).save_pretrained(folder)


@contextmanager
def _noting(trial: Trial, about: str) -> Iterator[None]:
    """What fails inside is a note."""
    try:
        yield
    except PolytraceError as error:
        trial.notes.append(_told(about, error.message))
    except Exception as error:  # noqa: BLE001 - whatever a class does, the others are tried
        first = str(error).strip().split("\n")[0]
        trial.notes.append(_told(about, f"{type(error).__name__}: {first}"))


def _told(about: str, message: str) -> str:
    return f"{about}: {message}" if about else message
