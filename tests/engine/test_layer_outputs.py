"""`output[0]` of a layer that returns one tensor: the hidden states by prompts, refused where models are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_kinds import KINDS, ids, seeded
from torch import Tensor, nn

import polytrace
from polytrace.codec import from_json, to_json
from polytrace.description import ModelDescription
from polytrace.errors import GraphError

HERE = r"\(test_layer_outputs.py:\d+\)"


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


class Around(nn.Module):
    """Somebody's module with a model of transformers in it, and a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = gpt2()
        self.own = nn.ModuleList([nn.Sequential(nn.Linear(64, 8)), nn.Linear(64, 8)])

    def forward(self, input_ids: Tensor) -> list[Tensor]:
        logits = self.body(input_ids).logits
        return [module(logits) for module in self.own]


@pytest.mark.parametrize("index", [0, 1, -1])
def test_an_int_on_a_layer_of_a_model_that_is_called_is_refused(index: int) -> None:
    model = polytrace.load(gpt2())
    told = rf"`output\[{index}\]` means two things .*write `.output` for the hidden states, `.output\[{index}:.*{HERE}"
    with pytest.raises(GraphError, match=told), model.trace(ids(2, 5)):
        model.transformer.h[1].output[index].save()
    with pytest.raises(GraphError, match=told), model.trace(ids(2, 5)):
        model.transformer.h[1].output[index] = 0
    with pytest.raises(GraphError, match=told), model.trace(ids(2, 5)):
        model.transformer.h[1].output[index][:, -1] += 1


def test_the_first_sequence_is_named_and_unpacking_is_refused() -> None:
    model = polytrace.load(gpt2())
    with pytest.raises(GraphError, match=r"`\.output\[0:1\]` for the first sequence"), model.trace(ids(2, 5)):
        model.transformer.h[0].output[0]
    with pytest.raises(GraphError, match=rf"unpacking .*`\.output\.unbind\(0\)`.*{HERE}"), model.trace(ids(2, 5)):
        _hidden, _ = model.transformer.h[0].output
    with pytest.raises(GraphError, match="means two things"), model.trace(ids(2, 5)) as tracer:
        tracer.cache([model.transformer.h[0]], select=lambda hidden: hidden[0])


def test_what_is_advised_has_the_bits_of_hooks() -> None:
    plain = gpt2()
    model, tokens = polytrace.load(plain), ids(2, 5)

    def by_hook(rows: slice) -> Tensor:
        def put(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output[rows, -1] = 0
            return output

        handle = plain.get_submodule("transformer.h.1").register_forward_hook(put)
        with torch.no_grad():
            found: Tensor = plain(tokens).logits
        handle.remove()
        return found

    with model.trace(tokens):
        model.transformer.h[1].output[:, -1] = 0
        every = model.output.logits.save()
    with model.trace(tokens):
        model.transformer.h[1].output[0:1][:, -1] = 0
        first = model.output.logits.save()
    with model.trace(tokens):
        model.transformer.h[1].output[0, -1] = 0  # an index of several says which sequence
        same = model.output.logits.save()
    assert torch.equal(every, by_hook(slice(None))) and torch.equal(first, by_hook(slice(0, 1)))
    assert torch.equal(same, first)
    assert (every[1, -1] - first[1, -1]).abs().max() > 1e-2, "the second sequence is edited in one of them"


@pytest.mark.parametrize("kind", ["bert", "vit", "clip", "bart", "whisper"])
def test_layers_of_every_kind_refuse_it(kind: str) -> None:
    plain, layer, call, _ = KINDS[kind]()
    model = polytrace.load(plain)
    with pytest.raises(GraphError, match="means two things"), model.trace(**call):
        model.get_submodule(layer).output[0].save()


def test_a_layer_that_returns_a_tuple_and_everything_else_is_indexed_as_before() -> None:
    plain, layer, call, _ = KINDS["t5"]()
    model = polytrace.load(plain)
    with model.trace(**call):
        hidden = model.get_submodule(layer).output[0].save()
    assert hidden.shape == (2, 3, 16)

    model, tokens = polytrace.load(gpt2()), ids(2, 5)
    with model.trace(tokens):
        mlp = model.transformer.h[0].mlp.output[0].save()
        given = model.transformer.h[0].input[0].save()
        logits = model.lm_head.output[0].save()
    assert (mlp.shape, given.shape, logits.shape) == ((5, 16), (5, 16), (5, 64))


def test_modules_of_ones_own_are_indexed_and_the_model_in_them_is_not() -> None:
    model, tokens = polytrace.load(Around().eval()), ids(2, 5)
    with model.trace(tokens):
        first, second = model.own[0].output[0].save(), model.own[1].output[0].save()
    assert first.shape == second.shape == (5, 8)
    with pytest.raises(GraphError, match="means two things"), model.trace(tokens):
        model.body.transformer.h[1].output[0].save()


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return seeded(lambda: transformers.ConvNextModel(config))


def wav2vec2() -> nn.Module:
    sizes = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "intermediate_size": 16}
    config = transformers.Wav2Vec2Config(
        **sizes,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return seeded(lambda: transformers.Wav2Vec2Model(config))


CONVOLUTIONS = {
    "stages": (convnext, "encoder.stages.0", torch.randn(2, 3, 32, 32)),
    "layers": (wav2vec2, "feature_extractor.conv_layers.0", torch.randn(2, 400)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_what_has_always_given_a_tensor_is_indexed(kind: str) -> None:
    make, path, x = CONVOLUTIONS[kind]
    plain = make()
    seen: list[Tensor] = []
    handle = plain.get_submodule(path).register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        plain(x)
    handle.remove()
    model = polytrace.load(plain)
    with model.trace(x):
        first = model.get_submodule(path).output[0].save()
    assert torch.equal(first, seen[0][0])


def test_beside_convolutions_layers_that_attend_refuse_it() -> None:
    model = polytrace.load(wav2vec2())
    with pytest.raises(GraphError, match="means two things"), model.trace(torch.randn(2, 400)):
        model.encoder.layers[0].output[0].save()


class Graded(nn.Module):
    """A model of transformers inside of `torch.func.grad`, where no tensor is anybody's to read."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = KINDS["vit"]()[0]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.func.grad(lambda own: self.vit(own).logits.sum())(x)
        return found


def test_layers_inside_of_torch_func_are_no_obstacle() -> None:
    plain = Graded().eval()
    _, layer, call, _ = KINDS["vit"]()
    x = call["pixel_values"]
    model = polytrace.load(plain)
    with model.trace(x):
        ours = model.output.save()
    with torch.no_grad():
        torch.testing.assert_close(ours, plain(x))
    with pytest.raises(GraphError, match=r"torch\.func"), model.trace(x):
        model.get_submodule(f"vit.{layer}").output[0].save()


def test_clients_of_a_service_know_these_layers() -> None:
    description = polytrace.load(gpt2()).description
    layers = [info.path for info in description.modules if info.is_layer]
    assert layers == ["transformer.h.0", "transformer.h.1"]
    assert from_json(ModelDescription, to_json(description)) == description


def test_beside_the_decoder_layers_of_a_folder_it_is_refused_too(tmp_path: Path) -> None:
    """BART's encoder returns bare tensors, and only its decoder's layers are those of the description."""
    KINDS["bart"]()[0].save_pretrained(tmp_path)
    model = polytrace.load(str(tmp_path))
    with pytest.raises(GraphError, match="means two things"), model.trace([[5, 6, 7], [8, 9]]):
        model.model.encoder.layers[1].output[0].save()
    with model.trace([[5, 6, 7], [8, 9]]):
        encoded = model.model.encoder.layers[1].output.save()
        decoded = model.model.decoder.layers[1].output[0].save()
    assert encoded.shape == (2, 3, 16) and decoded.shape == (2, 1, 16)
