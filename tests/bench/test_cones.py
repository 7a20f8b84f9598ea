"""The benchmark of causal cones: rows are counted right, opponents do the same work, wrong numbers are noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bench import pictures
from bench.cones import benchmark
from bench.cones.bare import Bare
from bench.cones.by_batch import run_batched
from bench.cones.by_hand import ByHand
from bench.cones.cones import layer_rows, token_layers_alone
from bench.cones.contest import TOLERANCE, largest_difference, largest_effect, rows_that_ran
from bench.cones.growth import Growth
from bench.cones.hooks import read_sources
from bench.cones.models import folder_of
from bench.cones.workloads import CASES, Read, Shape, Workload, evenly, make_workload, many_donors, shape_of
from bench.plain import Plain, difference
from polytrace.certificate import PassEntry, Receipt

TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("4x64", cache=tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return Plain(folder)


def workload_of(folder: Path, case: str) -> Workload:
    return make_workload(case, shape_of(folder), tokens=TOKENS, size=24)


def rows_by_definition(workload: Workload, shape: Shape) -> tuple[int, ...]:
    """Distinct (tokens so far, edits so far) of every row that a run needs in a layer."""
    needed: list[set[object]] = [set() for _ in range(shape.layers)]
    depths = [run.layer + 1 if run.read is Read.HIDDEN else shape.layers for run in workload.runs]
    for run, depth in zip(workload.runs, depths, strict=True):
        for layer in range(0 if run.read is Read.NOTHING else depth):
            for position in range(len(run.ids)):
                edits = [
                    (edit.point, edit.layer, edit.start, edit.stop, edit.channels, edit.source, id(edit.added))
                    for edit in run.edits
                    if edit.first_layer <= layer and edit.start <= position
                ]
                needed[layer].add((run.ids[: position + 1], tuple(edits)))
    return tuple(map(len, needed))


@pytest.mark.parametrize("case", CASES)
def test_the_counted_rows_are_those_that_differ_by_tokens_or_edits(folder: Path, case: str) -> None:
    workload = workload_of(folder, case)
    rows = layer_rows(workload, shape_of(folder).layers)
    assert rows == rows_by_definition(workload, shape_of(folder))
    assert 0 < sum(rows) <= token_layers_alone(workload, shape_of(folder).layers)


@pytest.mark.parametrize("case", CASES)
def test_the_bare_forward_runs_the_counted_rows_and_gives_what_plain_runs_give(
    folder: Path, plain: Plain, case: str
) -> None:
    workload = workload_of(folder, case)
    rows = layer_rows(workload, shape_of(folder).layers)
    bare = Bare(plain, workload, stream_rows=100)  # several streams
    assert bare.layer_rows == rows
    logits = torch.cat(bare())
    own = {run.ids for run in workload.runs if run.read in (Read.LOGITS, Read.DIFFERENCE)}
    expected = [plain.logits(ids)[0, -1] for ids in own]
    assert len(logits) == sum(run.read in (Read.LOGITS, Read.DIFFERENCE) for run in workload.runs)
    for row in logits:
        assert min(difference(row, one) for one in expected) <= TOLERANCE
    more = tuple(count + 3 for count in rows)
    filled = Bare(plain, workload, ran=more)
    assert filled.layer_rows == more
    assert difference(torch.cat(filled()), logits) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_best_by_hand_gives_what_one_run_each_gives_and_notices_a_dropped_edit(
    folder: Path, plain: Plain, case: str
) -> None:
    workload = workload_of(folder, case)
    by_hand = ByHand(plain, workload, rows=256)()
    members = [member for member, run in enumerate(workload.runs) if run.read is not Read.NOTHING]
    one_each = run_batched(plain, workload, members, read_sources(plain, workload), rows=1)
    assert by_hand.keys() == one_each.keys() == set(members)
    assert largest_difference(by_hand, one_each) <= TOLERANCE
    if any(run.edits for run in workload.runs):
        unedited = tuple(dataclasses.replace(run, edits=()) for run in workload.runs)
        without = run_batched(plain, dataclasses.replace(workload, runs=unedited), members, {}, rows=256)
        assert largest_difference(by_hand, without) > 100 * TOLERANCE


@pytest.mark.wide
def test_the_whole_benchmark_runs_is_right_and_can_be_recorded(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(benchmark.config_for(folder, quick=True), pictures=str(tmp_path))
    figures = benchmark.run(config)
    assert benchmark.is_right(figures)
    assert [cell["case"] for cell in figures["cells"]] == list(CASES)
    json.dumps([dataclasses.asdict(config), figures], allow_nan=False)
    for cell in figures["cells"]:
        assert cell["ratios"].keys() >= {"one each / polytrace", "hand-batched / polytrace", "best by hand / polytrace"}
        assert cell["token_layers"]["ran"] == cell["token_layers"]["counted"]
        assert cell["title"] in benchmark.tell(figures)
    assert {path.name for path in tmp_path.iterdir()} == {"cones-invokes.png", "cones-tokens.png"}
    figures["cells"][0]["largest_difference"]["one each"] = 2 * TOLERANCE
    assert not benchmark.is_right(figures)


def test_sweeps_are_cut_evenly_and_never_in_step_with_a_period() -> None:
    chosen = evenly(range(512), 16)
    assert len(chosen) == 16
    assert [one // 32 for one in chosen] == list(range(16))
    assert len({one % 64 for one in chosen}) > 8
    assert evenly(range(5), 9) == list(range(5))


def test_a_sweep_larger_than_layers_x_tokens_has_more_clean_prompts(folder: Path, plain: Plain) -> None:
    shape = shape_of(folder)
    workload = many_donors(shape, tokens=TOKENS, size=200)
    assert len(workload.swept) == 200
    assert len({run.ids for run in workload.runs}) == 1 + -(-200 // (shape.layers * TOKENS))
    values = run_batched(plain, workload, [0, *workload.swept], read_sources(plain, workload), rows=512)
    effect = largest_effect(workload, values)
    assert effect is not None
    assert effect > 100 * TOLERANCE


def test_rows_of_a_pass_that_several_requests_shared_count_once() -> None:
    def receipt(*entries: PassEntry) -> Receipt:
        numbers: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(Receipt)}
        return Receipt(**{**numbers, "passes": entries})

    first = PassEntry(pass_id=1, requests=2, tokens=9, layer_rows=(9, 5), seconds=0.1)
    second = PassEntry(pass_id=2, requests=1, tokens=4, layer_rows=(4,), seconds=0.1)
    assert rows_that_ran([receipt(first), receipt(first, second)]) == (13, 5)


def test_growth_is_a_picture_with_both_axes_logarithmic(tmp_path: Path) -> None:
    rows = [
        {
            "at": size,
            "seconds": 0.01 * size,
            "stages_s": {"record": 0.001 * size, "compile": 0.001 * size, "plan": 0.0005 * size, "run": 0.008 * size},
            "hand_batched_s": 0.05 * size,
        }
        for size in Growth().invokes
    ]
    path = tmp_path / "growth.png"
    pictures.draw_growth(path, rows=rows, title="growth", label="invokes")
    with Image.open(path) as image:
        assert image.width > image.height > 400
