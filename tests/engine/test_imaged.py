"""A vision-language model as the language model in it: prompts with images are rows of shared passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from processes import ProcessBackend, ProcessShards
from seeing import IMAGE, PROMPT, ROWS, TEXT, Imaged
from torch import Tensor, nn

from engine.census import Census
from engine.image_proofs import prove_images
from engine.links import Solo
from engine.loading import ShardConfig, load_model, meta_model
from polytrace.errors import GraphError, ServiceError
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
GRIDS = [(2, 1), (2, 2)]  # stages and ranks
LANGUAGE = ("model.language_model.embed_tokens.", "model.language_model.", "lm_head.")


@pytest.fixture(scope="module")
def imaged(tmp_path_factory: pytest.TempPathFactory) -> Imaged:
    return Imaged(tmp_path_factory.mktemp("llava"))


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))


def _by_hand(imaged: Imaged, photo: Tensor | None, prompt: list[int], module: str | None, change: Any) -> Tensor:
    """Logits of plain Hugging Face, with a hook that changes what a module gives."""
    handles = []
    if module is not None:
        handles.append(imaged.plain.get_submodule(module).register_forward_hook(lambda _m, _a, out: change(out)))
    given = {} if photo is None else {"pixel_values": photo[None]}
    with torch.no_grad():
        found: Tensor = imaged.plain(input_ids=torch.tensor([prompt]), **given).logits
    for handle in handles:
        handle.remove()
    return found


def _patched_by_hand(imaged: Imaged, giver: int) -> Tensor:
    """Logits of the second photo, where rows behind the first layer are the first photo's behind layer `giver`."""
    with imaged.model.trace(PROMPT, pixel_values=imaged.photos[:1]):
        wanted = imaged.model.model.language_model.layers[giver].output.save()

    def put(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[:, 2:6] = wanted[:, 2:6]
        return changed

    return _by_hand(imaged, imaged.photos[1], PROMPT, "model.language_model.layers.0", put)


def _later(value: Any) -> Any:
    changed = value.clone()
    changed[:, 3:5] += 1.0  # rows of the image
    return changed


EDITS = {
    "model.language_model.layers.0": _later,
    "model.language_model.layers.1.mlp": lambda value: value * 0.5,
    "model.language_model.layers.0.self_attn.q_proj": _later,
}


@pytest.mark.parametrize("module", EDITS)
def test_an_edit_of_rows_of_an_image_is_that_of_a_hook(imaged: Imaged, module: str) -> None:
    photo, change = imaged.photos[0], EDITS[module]
    with imaged.model.trace(PROMPT, pixel_values=photo[None]):
        site: Any = imaged.model
        for name in module.split("."):
            site = site[int(name)] if name.isdigit() else getattr(site, name)
        site.output = change(site.output)
        logits = imaged.model.lm_head.output.save()
    assert _close(logits, _by_hand(imaged, photo, PROMPT, module, change))
    assert not _close(logits, _by_hand(imaged, photo, PROMPT, None, None))


def _crowd(model: Any, photos: Tensor) -> list[Any]:
    """Traces that differ in their images, in an edit, or have none; two are equal but for the user."""
    crowd = []
    for photo, is_edited in ((0, False), (1, False), (0, True), (0, False), (None, False)):
        pixels = None if photo is None else photos[photo : photo + 1]
        with model.trace(TEXT if pixels is None else PROMPT, pixel_values=pixels, run=False) as tracer:
            if is_edited:
                model.model.language_model.layers[0].output[:, 6] += 1.0
            model.model.language_model.layers[1].output.save()
            model.lm_head.output.save()
        crowd.append(tracer)
    return crowd


def _run(model: Any, tracers: list[Any]) -> list[Any]:
    backend = model.backend
    outcomes = backend.run_together([backend.work_out(tracer.built_request()) for tracer in tracers])
    assert all(outcome.error is None for outcome in outcomes)
    return outcomes


def test_prompts_with_images_have_their_bits_whoever_is_beside_them(imaged: Imaged) -> None:
    crowd = _crowd(imaged.model, imaged.photos)
    merged = _run(imaged.model, crowd)
    assert all(entry.requests == len(crowd) for outcome in merged for entry in outcome.receipt.passes)
    for tracer, outcome in zip(crowd, merged, strict=True):
        (alone,) = _run(imaged.model, [tracer])
        for name, value in outcome.values.items():
            assert torch.equal(value, alone.values[name])
    logits = [next(value for value in outcome.values.values() if value.shape[-1] == 64) for outcome in merged]
    for found, photo in zip(logits[:2], imaged.photos, strict=False):
        assert _close(found, _by_hand(imaged, photo, PROMPT, None, None))
    assert not _close(logits[0], logits[1])  # the same text, another image
    assert torch.equal(logits[0], logits[3])
    # what is shared are the rows before the images differ, and all of an equal prompt: 9 + 7 + 3 + 4 of 31
    assert merged[0].receipt.passes[0].tokens < sum(len(PROMPT) if place < 4 else len(TEXT) for place in range(5))


def test_several_images_stand_in_several_prompts_in_order(imaged: Imaged) -> None:
    prompts = [PROMPT, [6, *[IMAGE] * ROWS, 8, *[IMAGE] * ROWS]]
    with imaged.model.trace(prompts, pixel_values=imaged.photos):
        logits = imaged.model.lm_head.output.save()
    with torch.no_grad():
        last = imaged.plain(input_ids=torch.tensor([prompts[1]]), pixel_values=imaged.photos[1:]).logits
    assert _close(logits[:1, 1:], _by_hand(imaged, imaged.photos[0], PROMPT, None, None))
    assert _close(logits[1:], last)


def test_values_and_images_flow_between_invokes(imaged: Imaged) -> None:
    layer = imaged.model.model.language_model.layers[0]
    with imaged.model.trace() as tracer:
        with tracer.invoke(PROMPT, pixel_values=imaged.photos[:1]):
            clean = layer.output[:, 2:6]
        with tracer.invoke({"input_ids": [PROMPT], "pixel_values": imaged.photos[1:2]}):
            layer.output[:, 2:6] = clean
            patched = imaged.model.lm_head.output.save()
    assert _close(patched, _patched_by_hand(imaged, 0))


def test_traces_of_a_session_have_their_images(imaged: Imaged) -> None:
    with imaged.model.session():
        with imaged.model.trace(PROMPT, pixel_values=imaged.photos[:1]):
            last = imaged.model.model.language_model.layers[1].output[:, 2:6]
        with imaged.model.trace({"input_ids": [PROMPT], "pixel_values": imaged.photos[1:2]}):  # a wave of its own
            imaged.model.model.language_model.layers[0].output[:, 2:6] = last
            patched = imaged.model.lm_head.output.save()
    assert _close(patched, _patched_by_hand(imaged, 1))


def test_a_gradient_at_rows_of_an_image_is_torchs(imaged: Imaged) -> None:
    photo = imaged.photos[:1]
    with imaged.model.trace(PROMPT, pixel_values=photo):
        hidden = imaged.model.model.language_model.layers[0].output
        imaged.model.lm_head.output[0, -1, 7].backward()
        gradient = hidden.grad.save()
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = imaged.plain.model.language_model.layers[0].register_forward_hook(keep)
    imaged.plain.requires_grad_(True)
    imaged.plain(input_ids=torch.tensor([PROMPT]), pixel_values=photo).logits[0, -1, 7].backward()
    imaged.plain.requires_grad_(False)
    handle.remove()
    assert kept[0].grad is not None and kept[0].grad[:, 2:6].abs().max() > 1e-6
    assert _close(gradient, kept[0].grad)


SITES: dict[str, Callable[[Any], Any]] = {
    "layers[0].input": lambda text: text.layers[0].input,
    "layers[0].inputs": lambda text: text.layers[0].inputs[0][0],
    "input_layernorm.input": lambda text: text.layers[0].input_layernorm.input,
    "inputs_embeds": lambda text: text.inputs[1]["inputs_embeds"],
}


def test_what_the_first_layer_gets_has_the_gradient_of_all_rows(imaged: Imaged) -> None:
    layer = imaged.plain.model.language_model.layers[0]
    kept: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    imaged.plain.requires_grad_(True)
    logits = imaged.plain(input_ids=torch.tensor([PROMPT]), pixel_values=imaged.photos[:1]).logits
    (wanted,) = torch.autograd.grad(logits[0, -1, 7], kept)
    imaged.plain.requires_grad_(False)
    handle.remove()
    assert wanted[:, 2:6].abs().amax(-1).min() > 1e-2
    text = imaged.model.model.language_model
    for site in SITES.values():
        with imaged.model.trace(PROMPT, pixel_values=imaged.photos[:1]):
            value, loss = site(text), imaged.model.lm_head.output[0, -1, 7]
            gradients: Any = torch.autograd.grad(loss, [value])
            with loss.backward():
                own, embedded = value.grad.save(), text.embed_tokens.output.grad.save()
            asked = gradients[0].save()
        assert _close(own, wanted) and _close(asked, wanted)
        assert _close(embedded[:, :2], wanted[:, :2]) and _close(embedded[:, 6:], wanted[:, 6:])
        assert not embedded[:, 2:6].any()  # another tensor: images come over it


def test_an_embedding_and_what_the_first_layer_gets_are_two_tensors(imaged: Imaged) -> None:
    photo, text = imaged.photos[0], imaged.model.model.language_model
    with imaged.model.trace(PROMPT, pixel_values=photo[None]):
        text.embed_tokens.output[:] += 1.0
        logits = imaged.model.lm_head.output.save()
    name = "model.language_model.embed_tokens"
    plain = _by_hand(imaged, photo, PROMPT, None, None)
    assert _close(logits, _by_hand(imaged, photo, PROMPT, name, lambda value: value + 1.0))
    assert not _close(logits, plain)
    with imaged.model.trace(PROMPT, pixel_values=photo[None]):
        embedded, got = text.embed_tokens.output.save(), text.layers[0].input.save()
    with imaged.model.trace(PROMPT, pixel_values=photo[None]):
        text.embed_tokens.output[:] += 1.0
        raised = text.layers[0].input.save()
    assert _close(raised[:, [0, 1, 6, 7, 8]], got[:, [0, 1, 6, 7, 8]] + 1.0) and torch.equal(
        raised[:, 2:6], got[:, 2:6]
    )
    with imaged.model.trace(PROMPT, pixel_values=photo[None]):
        text.layers[0].input[:] += 1.0
        same, logits = text.embed_tokens.output.save(), imaged.model.lm_head.output.save()
    assert torch.equal(same, embedded) and not torch.equal(embedded, got)
    handle = imaged.plain.model.language_model.layers[0].register_forward_pre_hook(
        lambda _module, args: (args[0] + 1.0, *args[1:])
    )
    wanted = _by_hand(imaged, photo, PROMPT, None, None)
    handle.remove()
    assert _close(logits, wanted) and not _close(wanted, plain)


def _greedy(imaged: Imaged, prompt: list[int], photo: Tensor | None, new: int, **more: Any) -> list[int]:
    given = {} if photo is None else {"pixel_values": photo[None]}
    ids = torch.tensor([prompt])
    made = imaged.plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **given, **more
    )
    return list(made[0, len(prompt) :].tolist())


def test_prompts_with_images_go_on_as_transformers_lets_them_beside_prompts_of_text(imaged: Imaged) -> None:
    new = 8
    with imaged.model.generate(max_new_tokens=new) as tracer:
        for photo in imaged.photos[:2]:
            with tracer.invoke(PROMPT, pixel_values=photo[None]):
                pass
        with tracer.invoke(TEXT):
            pass
        with tracer.invoke({"input_ids": [PROMPT], "pixel_values": imaged.photos[2:]}, repetition_penalty=5.0):
            pass
    ids = [list(one.ids) for one in tracer.result]
    plain = [_greedy(imaged, PROMPT, photo, new) for photo in imaged.photos[:2]]
    assert ids[0] != ids[1]  # the image decides
    assert ids[:3] == [*plain, _greedy(imaged, TEXT, None, new)]
    assert ids[3] == _greedy(imaged, PROMPT, imaged.photos[2], new, repetition_penalty=5.0)
    assert ids[3] != _greedy(imaged, PROMPT, imaged.photos[2], new)
    assert tracer.result[0].prompt == tuple(PROMPT)
    with imaged.model.generate(PROMPT, pixel_values=imaged.photos[:1], max_new_tokens=new) as alone, alone.iter[2]:
        imaged.model.model.language_model.layers[0].output[:] = 0
    assert list(alone.result.ids)[:2] == plain[0][:2] and list(alone.result.ids) != plain[0]


def test_samples_of_a_prompt_have_its_images(imaged: Imaged) -> None:
    prompts = [[6, *[IMAGE] * ROWS, 8, *[IMAGE] * ROWS], PROMPT]
    given = {"pixel_values": imaged.photos, "max_new_tokens": 3, "do_sample": True, "seed": 3}
    with imaged.model.generate(prompts, n=2, **given) as tracer:
        logits = imaged.model.lm_head.output[:, -1].save()
    with torch.no_grad():
        first = imaged.plain(input_ids=torch.tensor(prompts[:1]), pixel_values=imaged.photos[:2]).logits[:, -1]
    last = _by_hand(imaged, imaged.photos[2], PROMPT, None, None)[:, -1]
    assert len(tracer.result) == 4 and _close(logits, torch.cat([first, first, last, last]))


def test_what_is_not_there_is_refused_with_what_to_do(imaged: Imaged) -> None:
    model, photos = imaged.model, imaged.photos
    with pytest.raises(GraphError, match="prompts have room for 1, not 2"):
        model.trace(PROMPT, pixel_values=photos[:2])
    with pytest.raises(GraphError, match=r"\[images, 3, 8, 8\]"):
        model.trace(PROMPT, pixel_values=photos[0])
    with pytest.raises(GraphError, match=r"tensor of floats \[images, 3, 8, 8\]; this is uint8 \[1, 3, 8, 8\]"):
        model.trace(PROMPT, pixel_values=photos[:1].to(torch.uint8))
    with pytest.raises(GraphError, match="prompt 0 has 3 of them"):
        model.trace([1, IMAGE, IMAGE, IMAGE], pixel_values=photos[:1])
    with pytest.raises(GraphError, match="whole=True"), model.trace(PROMPT, pixel_values=photos[:1]):
        model.model.vision_tower.output.save()
    with pytest.raises(GraphError, match="images to a trace of their own"):
        list(model.map([{"input_ids": PROMPT, "pixel_values": photos[:1]}], dict))
    with pytest.raises(GraphError, match="kept on the service cannot be"):
        model.trace(PROMPT, pixel_values=_Kept(photos[:1]))
    with pytest.raises(GraphError, match=r"made without any.*whole=True.*test_imaged"):
        model.trace(PROMPT, pixel_values=photos[:1].clone().requires_grad_(True))


class _Kept:
    """What stands on a service already, as far as is looked at."""

    kept_tensor = True

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype = value.shape, value.dtype


def test_the_first_stage_alone_has_what_sees_images(imaged: Imaged) -> None:
    stages = [load_model(ShardConfig(source=imaged.folder, stage=stage, stages=2), Solo()) for stage in range(2)]
    whole = imaged.plain.state_dict()
    names = [set(loaded.model.state_dict()) for loaded in stages]
    seeing = {name for name in whole if name.startswith(("model.vision_tower.", "model.multi_modal_projector."))}
    assert seeing and seeing <= names[0] and not seeing & names[1]
    assert names[0] | names[1] == set(whole)
    layout = stages[0].layout
    assert all(layout.home(name, 2) == 0 for name in seeing)
    parts = [{id(whole[name]): whole[name].nbytes for name in own} for own in names]
    assert [loaded.weight_bytes for loaded in stages] == [sum(own.values()) for own in parts]
    census = Census(meta_model(imaged.folder))  # what plans of hardware count
    census.check(2, 1)
    assert [share.weight_bytes for share in census.shares(2, 1)] == [loaded.weight_bytes for loaded in stages]
    # what decides where stages are cut has it too
    sizes = {prefix: sum(whole[name].nbytes for name in whole if name.startswith(prefix)) for prefix in LANGUAGE}
    assert layout.shares[0] > (sum(whole[name].nbytes for name in seeing) + sizes[LANGUAGE[0]]) / sum(
        {id(tensor): tensor.nbytes for tensor in whole.values()}.values()
    )


def test_a_family_whose_image_rows_see_each_other_is_refused_and_told_how_it_runs(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    text = transformers.GemmaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=1, head_dim=8, vocab_size=64)
    vision = transformers.SiglipVisionConfig(**sizes, num_hidden_layers=2, image_size=8, patch_size=4)
    config = transformers.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63)
    config.save_pretrained(tmp_path)
    with pytest.raises(ServiceError, match=r"whole=True"):
        prove_images(str(tmp_path))


@pytest.fixture(scope="module", params=GRIDS, ids="{0[0]}x{0[1]}".format)
def split(imaged: Imaged, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    stages, ranks = request.param
    shards = ProcessShards(imaged.folder, stages=stages, ranks=ranks)
    yield ranks, Model(ProcessBackend(imaged.folder, shards, tmp_path_factory.mktemp("results")))
    shards.close()


def test_stages_change_no_bit_and_ranks_are_right_in_whatever_company(imaged: Imaged, split: Any) -> None:
    ranks, model = split
    merged = _run(model, crowd := _crowd(model, imaged.photos))
    for ours, expected, tracer in zip(
        merged, _run(imaged.model, _crowd(imaged.model, imaged.photos)), crowd, strict=True
    ):
        (alone,) = _run(model, [tracer])
        for name, value in ours.values.items():
            assert torch.equal(value, alone.values[name])
            wanted = expected.values[name]
            assert torch.equal(value, wanted) if ranks == 1 else _close(value, wanted)
    logits = [next(value for value in ours.values.values() if value.shape[-1] == 64) for ours in merged]
    for found, photo in zip(logits[:2], imaged.photos, strict=False):
        assert _close(found, _by_hand(imaged, photo, PROMPT, None, None))
