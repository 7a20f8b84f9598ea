"""README says what is true: its examples run, and its tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench.plain import TOLERANCE, Plain, difference

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLES = [
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "polytrace.connect(" not in block
]


def test_the_examples_run_one_after_another_and_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    outputs = []
    for number, block in enumerate(EXAMPLES):
        # compiled under its own name, so that an error names the block and its line
        exec(compile(block, f"README.md, example {number + 1}", "exec"), names)
        outputs.append(capsys.readouterr().out)
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


def test_every_module_has_its_line_in_the_tree() -> None:
    tree = README.partition("<!-- the files")[2].partition("<!-- end of the files -->")[0]
    named = set(re.findall(r"^ *([\w./]+\.py|[\w/]+/) ", tree, re.MULTILINE))
    rooms = ("polytrace", "scheduling", "engine", "cluster", "api", "bench")
    there = {path.name for room in rooms for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
    assert {name for name in named if name.endswith(".py")} == there, "run scripts/tree.py"
    assert {f"{room}/" for room in rooms} < named
