"""README and the page of the language say what is true: their examples run, and the tree is the tree."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pages import ROOT, run_all

from bench.plain import TOLERANCE, Plain, difference

README = (ROOT / "README.md").read_text()


def test_the_examples_run_one_after_another_and_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    outputs = run_all("README.md", names, capsys)
    assert outputs[0].startswith(" Paris\n")
    plain = Plain(ROOT / "bench" / "tinyworld" / "model")
    ids = plain.ids("The Eiffel Tower is in the city of")
    logits, hidden = names["logits"], names["hidden"]
    assert isinstance(logits, torch.Tensor)
    assert isinstance(hidden, torch.Tensor)
    assert difference(logits, plain.logits(ids)[:, -1]) <= TOLERANCE
    assert difference(hidden, plain.read(ids, outputs=["model.layers.3"])["model.layers.3"]) <= TOLERANCE
    changed = names["changed"]
    assert isinstance(changed, torch.Tensor)
    assert difference(changed, logits) > 1e-3, "the edits of the second example matter"


def test_the_page_of_the_language_runs_from_its_first_block_to_its_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    told = "".join(run_all("docs/language.md", names, capsys))
    assert "self_act_fn_0" in told or "apply_rotary_pos_emb_0" in told, "a source was printed"
    assert torch.equal(names["happy"], names["again"]), "an edited model and a trace that starts from the kept edit"
    assert len(names["session"].receipt.passes) == 1, "traces that exchange nothing share a pass"
    last, logits = names["both"], names["patched"]
    assert last.shape[0] == 2 and names["mapping"].results["mean"].shape == names["total"].fetch().shape
    assert logits.isfinite().all()


def test_the_page_of_generation_runs_and_says_what_comes_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    outputs = run_all("docs/generation.md", names, capsys)
    assert outputs[1].startswith(" the city of Paris."), "the likeliest tokens"
    assert "Rome" in outputs[3] and "Paris" in outputs[3], "a hidden state of another prompt leads elsewhere"
    assert outputs[4].startswith("torch.Size([6, 1, 256]) True") and "6 of 6" in outputs[4]
    assert outputs[6].strip() == str([[2, 8 + step, 4, 32] for step in range(4)]), "keys of all positions so far"
    assert " France is" in outputs[8], "a token that was forced"
    assert "fired at 4 of 4 steps" in outputs[10], "an edit acts at every step"
    assert outputs[11].startswith(" the| city|"), "tokens as they come"


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)?(?:#([\w-]+))?\)", page.read_text()):
            path, anchor = target
            if path.startswith("http"):
                continue
            there = (page.parent / path) if path else page
            assert there.exists(), f"{page.name} links to {path}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                known = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
                assert anchor in known, f"{page.name} links to {path}#{anchor}"


def test_every_module_has_its_line_in_the_tree() -> None:
    tree = README.partition("<!-- the files")[2].partition("<!-- end of the files -->")[0]
    named = set(re.findall(r"^ *([\w./]+\.py|[\w/]+/) ", tree, re.MULTILINE))
    rooms = ("polytrace", "scheduling", "engine", "cluster", "api", "bench")
    there = {path.name for room in rooms for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
    assert {name for name in named if name.endswith(".py")} == there, "run scripts/tree.py"
    assert {f"{room}/" for room in rooms} < named
