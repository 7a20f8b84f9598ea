"""Vision-language models whose images have grids of patches, and positions that follow from these, in shared passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_kinds import KINDS, seeded
from torch import Tensor

import polytrace
from engine.image_proofs import prove_images
from polytrace.errors import GraphError, ServiceError
from polytrace.wire import decode_request, encode_request

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
IMAGE, START, END = 61, 62, 63
TEXT = [5, 9, 2, 7]


def qwen2_5_vl() -> Any:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 24}
    vision |= {"out_hidden_size": 16, "window_size": 16, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START
    )
    return seeded(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> Any:
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "intermediate_size": 24}
    vision |= {"out_hidden_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START
    )


class Gridded:
    def __init__(self, plain: Any, folder: Path) -> None:
        self.plain = plain
        plain.generation_config.eos_token_id = None
        self.folder = str(folder)
        plain.save_pretrained(folder)
        self.model: Any = polytrace.load(self.folder, whole=False, threads=1)
        torch.manual_seed(1)
        self.patches = torch.randn(24, 96)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def gridded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Gridded:
    plain = KINDS["qwen2_vl"]()[0] if request.param == "qwen2_vl" else qwen2_5_vl()
    return Gridded(plain, tmp_path_factory.mktemp(request.param))


def _prompt(*grids: tuple[int, int, int]) -> list[int]:
    found = [1, 2]
    for t, h, w in grids:
        found += [START, *[IMAGE] * (t * h * w // 4), END, 3]
    return [*found, 4, 5]


def _given(patches: Tensor, *grids: tuple[int, int, int]) -> dict[str, Any]:
    """What a processor makes."""
    batch: dict[str, Any] = {"input_ids": torch.tensor([_prompt(*grids)])}
    if grids:
        batch |= {"pixel_values": patches, "image_grid_thw": torch.tensor(grids)}
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return batch


WIDE, HIGH = (1, 4, 6), (1, 6, 4)  # of as many patches
SMALL = (1, 4, 4), (1, 2, 4)


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


def _by_hand(gridded: Gridded, batch: dict[str, Any], *, is_edited: bool) -> Tensor:
    def change(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 4:6] += 1.0
        return output

    layer = gridded.plain.model.language_model.layers[0]
    handle = layer.register_forward_hook(change) if is_edited else None
    gridded.plain.model.rope_deltas = None
    with torch.no_grad():
        logits: Tensor = gridded.plain(**batch).logits
    if handle is not None:
        handle.remove()
    return logits


def test_traces_of_images_with_grids_are_those_of_hooks_alone_and_beside_others(gridded: Gridded) -> None:
    model, backend = gridded.model, gridded.model.backend
    crowd = [
        (_given(gridded.patches, WIDE), False),
        (_given(gridded.patches, HIGH), False),  # the same pixels
        (_given(gridded.patches, WIDE), True),
        (_given(gridded.patches, *SMALL), True),
        (_given(gridded.patches), False),
    ]
    tracers = []
    for batch, is_edited in crowd:
        with model.trace(batch, run=False) as tracer:
            if is_edited:
                model.model.language_model.layers[0].output[:, 4:6] += 1.0
            model.lm_head.output.save()
        tracers.append(tracer)
    programs = [backend.work_out(tracer.built_request()) for tracer in tracers]
    merged = [next(iter(outcome.values.values())) for outcome in backend.run_together(programs)]
    for (batch, is_edited), tracer, found in zip(crowd, tracers, merged, strict=True):
        (alone,) = backend.run_together([backend.work_out(tracer.built_request())])
        assert torch.equal(found, next(iter(alone.values.values())))
        assert _close(found, _by_hand(gridded, batch, is_edited=is_edited))
    assert not _close(merged[0], merged[1]) and not _close(merged[0], merged[2])


def test_generations_go_on_behind_images_with_grids_as_transformers_lets_them(gridded: Gridded) -> None:
    new = 6
    batches = [_given(gridded.patches, WIDE), _given(gridded.patches, *SMALL), _given(gridded.patches)]
    for _ in range(2):  # the second time from what the first has left
        with gridded.model.generate(max_new_tokens=new, eos=None) as tracer:
            for batch in batches:
                with tracer.invoke(batch):
                    pass
        for batch, going in zip(batches, tracer.result, strict=True):
            gridded.plain.model.rope_deltas = None
            ids = batch["input_ids"]
            made = gridded.plain.generate(
                **batch, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
            assert list(going.ids) == made[0, ids.shape[1] :].tolist()


def test_gradients_of_rows_of_an_image_with_a_grid_are_torchs(gridded: Gridded) -> None:
    batch = _given(gridded.patches, WIDE)
    with gridded.model.trace(batch):
        layer = gridded.model.model.language_model.layers[0]
        got, hidden = layer.input, layer.output
        gridded.model.lm_head.output[0, -1, 7].backward()
        found = [got.grad.save(), hidden.grad.save()]
    kept: list[Tensor] = []

    def before(_module: Any, args: Any) -> Any:
        kept.append(args[0].detach().requires_grad_(True))
        return (kept[-1], *args[1:])

    plain = gridded.plain.model.language_model.layers[0]
    handles = [plain.register_forward_pre_hook(before)]
    handles.append(plain.register_forward_hook(lambda _module, _args, output: kept.append(output)))
    gridded.plain.model.rope_deltas = None
    wanted = torch.autograd.grad(gridded.plain(**batch).logits[0, -1, 7], kept)
    for handle in handles:
        handle.remove()
    for ours, theirs in zip(found, wanted, strict=True):
        assert theirs[:, 3:9].abs().max() > 1e-6
        assert _close(ours, theirs)


def test_grids_travel_and_what_does_not_fit_them_is_refused(gridded: Gridded) -> None:
    model, patches = gridded.model, gridded.patches
    with model.trace(_given(patches, *SMALL), run=False) as tracer:
        model.lm_head.output[:, -1].save()
    sent = tracer.built_request()
    assert decode_request(b"".join(encode_request(sent))).invokes == sent.invokes
    prompt = _prompt(WIDE)
    with pytest.raises(GraphError, match="whole batch, which has image_grid_thw"):
        model.trace(prompt, pixel_values=patches)
    for grid, told in (
        ([[1, 4, 8]], "have 32 patches, pixel_values 24"),
        ([[1, 3, 8]], "2 x 2 patches to a row"),
        ([[1, -4, -6]], "whole numbers of patches"),
    ):
        with pytest.raises(GraphError, match=told):
            model.trace({"input_ids": [prompt], "pixel_values": patches, "image_grid_thw": torch.tensor(grid)})
    with pytest.raises(GraphError, match=r"\[6\] of these images; the prompts have \[5\]"):
        model.trace({**_given(patches, WIDE), "input_ids": [[1, *[IMAGE] * 5, 3]]})
    with pytest.raises(GraphError, match="no pixel_values_videos: a model that is called as it is"):
        model.trace({**_given(patches), "pixel_values_videos": patches})
    with pytest.raises(GraphError, match="others between two images"):
        model.trace({**_given(patches, *SMALL), "input_ids": [[1, *[IMAGE] * 6, 3]]})


def test_a_tiny_twin_proves_the_family_before_a_service_takes_it(tmp_path: Path) -> None:
    qwen2_5_vl().config.save_pretrained(tmp_path / "known")
    prove_images(str(tmp_path / "known"))
    qwen3_vl().save_pretrained(tmp_path / "other")  # which adds features of images to several layers
    with pytest.raises(ServiceError, match=r"other logits in shared passes.*whole=True"):
        prove_images(str(tmp_path / "other"))
