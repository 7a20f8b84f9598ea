"""The page of gradients says what is true: its blocks run, and give what plain autograd gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pages import ROOT, run_all

from bench.plain import TOLERANCE, Plain, difference


def test_the_page_of_gradients_runs_and_is_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    outputs = run_all("docs/gradients.md", names, capsys)
    plain = Plain(ROOT / "bench" / "tinyworld" / "model")
    ids = torch.tensor(plain.ids("The Eiffel Tower is in the city of"))[None]
    kept: list[torch.Tensor] = []
    layer = plain.model.model.layers[3]
    hook = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.enable_grad():
        embeddings = plain.model.model.embed_tokens(ids).detach().requires_grad_()
        logits = plain.model(inputs_embeds=embeddings).logits[0, -1]
        loss = logits[names["paris"]] - logits[names["rome"]]
        hidden, embedded = torch.autograd.grad(loss, [kept[0], embeddings])
    hook.remove()
    assert difference(names["grad"], hidden) <= TOLERANCE
    assert difference(names["saliency"], embedded.norm(dim=-1)) <= TOLERANCE
    assert outputs[2].strip() == "True", "gradients accumulate"
    assert outputs[3].startswith("torch.Size([8, 8])")
    assert outputs[4].strip() == "False", "a change of a gradient matters"
    first, *_, last = [float(line) for line in outputs[6].split()]
    assert last < first, "a tensor of one's own is trained"
    first, last = (float(number) for number in outputs[7].split("\n")[0].split())
    assert last < 0.1 * first, "a vector is learnt on the service"
    assert "Rome" in outputs[7], "and flips the fact"
