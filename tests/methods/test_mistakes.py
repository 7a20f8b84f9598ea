"""What a method cannot do as it is asked is an error with the user's line and the next step, never a number."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import model_of
from padded_families import MIXING, model_from
from small import loaded

from polytrace import methods
from polytrace.errors import GraphError

CLEAN, CORRUPT, SHORT = "The Eiffel Tower is in the city of", "The Galata Tower is in the city of", "The capital of"
LEAD = methods.logit_difference(" Paris", " Istanbul")
VECTOR = torch.ones(256)
MISTAKES: dict[str, Callable[[Any], Any]] = {
    "no token of any prompt": lambda m: methods.patch_heads(m, CLEAN, CORRUPT, LEAD, positions=[]),
    "is no token": lambda m: methods.patch_heads(m, CLEAN, CORRUPT, LEAD, positions=slice(50, 60)),
    "[] is no token": lambda m: methods.patch_activations(m, CLEAN, CORRUPT, LEAD, positions={"none": []}),
    "give positions as": lambda m: methods.ablate(m, CLEAN, LEAD, positions=[]),
    "an int, several": lambda m: methods.patch_paths(m, CLEAN, CORRUPT, LEAD, positions=[]),
    "no receiver stands behind": lambda m: methods.patch_paths(
        m, CLEAN, CORRUPT, LEAD, senders=[(5, 0)], receivers=[(2, 0, "q")]
    ),
    "nothing would be knocked out": lambda m: methods.knock_out_attention(m, CLEAN, 3, [5], LEAD),
    "units are heads or neurons": lambda m: methods.ablate(m, CLEAN, LEAD, of="mlp", units=[3]),
    "takes nothing from a reference": lambda m: methods.ablate(m, CLEAN, LEAD, method="zero", reference=[SHORT]),
    "no prompts in reference": lambda m: methods.ablate(m, CLEAN, LEAD, reference=[], layers=0),
    "top_k is 1-3200, not 0": lambda m: methods.steer(m, CLEAN, VECTOR, 5, top_k=0),
    "top_k is 1-3200, not 3201": lambda m: methods.steer(m, CLEAN, VECTOR, 5, top_k=3201),
    "1-3200, not 0": lambda m: methods.patchscope(m, CLEAN, SHORT, top_k=0),
    "not 0": lambda m: methods.object_attention_lens(m, CLEAN, SHORT, 3, top_k=0),
    "vectors are a tensor or Vectors, not str": lambda m: methods.steer(m, CLEAN, "happy", 5),
    "one prompt and one other, not 2 and 1": lambda m: methods.activation_addition(
        m, [CLEAN, SHORT], CORRUPT, layers=5
    ),
    "a tuned lens is a TunedLens": lambda m: methods.tuned_lens(m, CLEAN, "folder"),  # type: ignore[arg-type]
    "from TunedLens.load": lambda m: methods.lens_divergence(m, [CLEAN], "folder"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("told", MISTAKES)
def test_what_would_change_nothing_or_mean_nothing_is_refused(world: Any, told: str) -> None:
    with pytest.raises(GraphError) as caught:
        MISTAKES[told](world)
    assert told in str(caught.value)
    assert "test_mistakes.py:" in str(caught.value)


def test_integers_of_numpy_are_integers(world: Any, tmp_path: Path) -> None:
    last, plain = np.int64(-1), methods.contrastive_vectors(world, [CLEAN], [SHORT], layers=2)
    own: Any = methods.contrastive_vectors(world, [CLEAN], [SHORT], layers=2, positions=last)  # type: ignore[arg-type]
    assert torch.equal(own.tensor, plain.tensor)
    assert methods.logit_lens(world, CLEAN, layers=2, top_k=np.int64(3)).probability.sizes["rank"] == 3  # type: ignore[arg-type]
    kept = methods.collect_activations(world, [CLEAN, SHORT], to=tmp_path, layers=2, positions=last)  # type: ignore[arg-type]
    assert torch.equal(kept.array("resid_post.2")[0] - kept.array("resid_post.2")[1], plain[2])


def test_a_layer_without_attention_names_those_that_attend(tmp_path: Path) -> None:
    with loaded(model_from(MIXING["jamba"]), tmp_path) as model:
        lead = methods.logit_difference(3, 50)
        with pytest.raises(GraphError, match=r"layer 0 has no z: give layers=\[1, 3\]"):
            methods.ablate(model, [5, 9, 23], lead, method="zero")
        assert methods.ablate(model, [5, 9, 23], lead, method="zero", layers=[1, 3]).effect.sizes["layer"] == 2


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gemma 2 whose logits reach its cap, so that a distribution before the cap is another one; and the plain model."""
    plain = model_of("gemma2")
    plain.config.final_logit_softcapping = 0.5
    with loaded(plain, tmp_path_factory.mktemp("capped")) as model:
        yield model, plain


def test_steering_and_function_vectors_tell_what_a_model_that_caps_its_logits_says(capped: Any) -> None:
    model, plain = capped
    ids, other, wanted = [5, 9, 23, 41, 7], [8, 3, 71], 17
    with torch.no_grad():
        logits, plain_other = (plain(torch.tensor([one])).logits[0, -1] for one in (ids, other))
    found = methods.steer(model, [ids], torch.zeros(32), 1, tokens=[wanted])
    assert found.logit.item() == pytest.approx(float(logits[wanted]), abs=1e-5)
    assert found.probability.item() == pytest.approx(float(logits.softmax(-1)[wanted]), abs=1e-6)

    # what head 2 of layer 1 has behind `ids` put behind `other`, by a hook
    projection, put = plain.model.layers[1].self_attn.o_proj, []
    hook = projection.register_forward_pre_hook(lambda _module, args: put.append(args[0][0, -1].clone()))
    with torch.no_grad():
        plain(torch.tensor([ids]))
    hook.remove()
    size = put[0].shape[0] // plain.config.num_attention_heads

    def patch(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        changed = args[0].clone()
        changed[0, -1, 2 * size : 3 * size] = put[0][2 * size : 3 * size]
        return (changed,)

    hook = projection.register_forward_pre_hook(patch)
    with torch.no_grad():
        effect = (plain(torch.tensor([other])).logits[0, -1].softmax(-1) - plain_other.softmax(-1))[wanted]
    hook.remove()
    effects = methods.head_effects(model, methods.Task(clean=[ids], corrupt=[other], answers=[wanted]))
    assert abs(float(effect)) > 1e-5
    assert effects.values[1, 2] == pytest.approx(float(effect), abs=1e-7)


def test_a_missing_package_is_named_before_anything_runs(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    array = methods.logit_lens(world, CLEAN, top_k=1).probability.squeeze()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GraphError, match=r"need matplotlib: pip install 'polytrace\[methods\]'"):
        methods.line_plot(array)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(GraphError, match=r"need xarray: pip install 'polytrace\[methods\]'"):
        methods.logit_lens(world, CLEAN)
