"""The names that every decoder has, over every tiny family, against the same written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, few_of, model_of
from programs import difference
from standard import LAYER, NAMES, OF_LAYERS, by_hand, change, change_in_place, places
from torch import Tensor

import polytrace
from polytrace.errors import GraphError
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2, 4], [7, 3, 5, 1]]


@pytest.fixture(scope="module", params=few_of(sorted(FAMILIES)))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, plain = tmp_path_factory.mktemp("model"), model_of(request.param)
    plain.save_pretrained(folder)
    return request.param, plain, polytrace.load(str(folder), threads=1)


@pytest.fixture(scope="module")
def of_family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    backends: dict[str, Any] = {}

    def make(family: str, **more: Any) -> Model:
        if family not in backends:
            folder = tmp_path_factory.mktemp(family)
            model_of(family).save_pretrained(folder)
            backends[family] = polytrace.load(str(folder), threads=1).backend
        return Model(backends[family], **more)

    return make


@pytest.fixture(scope="module")
def gpt2(of_family: Any) -> Model:
    made: Model = of_family("gpt2")
    return made


def _read(model: Any, name: str) -> Any:
    return getattr(model, name)[LAYER] if name in OF_LAYERS else getattr(model, name)


def _write(model: Any, name: str, value: Any) -> None:
    if name in OF_LAYERS:
        getattr(model, name)[LAYER] = value
    else:
        setattr(model, name, value)


def _ask(model: Any, prompts: list[list[int]], edit: str | None, *, is_in_place: bool = False) -> dict[str, Tensor]:
    with model.trace(prompts):
        if edit is not None and is_in_place:
            change_in_place(_read(model, edit))
        elif edit is not None:
            _write(model, edit, change(_read(model, edit)))
        return {name: _read(model, name).save() for name in NAMES}


def _own(name: str, value: Tensor, number: int, length: int) -> Tensor:
    """A prompt's part of the left-padded view."""
    own = value[number : number + 1]
    return own[:, :, -length:, -length:] if name == "attention_probabilities" else own[:, -length:]


@pytest.mark.parametrize("is_in_place", [False, True], ids=["assigned", "in place"])
def test_every_name_reads_and_takes_edits_as_by_hand(served: Any, is_in_place: bool) -> None:
    family, plain, model = served
    untouched = [by_hand(plain, family, prompt, None) for prompt in PROMPTS]
    for edit in NAMES if is_in_place else (None, *NAMES):
        ours = _ask(model, PROMPTS, edit, is_in_place=is_in_place)
        for number, prompt in enumerate(PROMPTS[:1] if is_in_place else PROMPTS):
            expected = by_hand(plain, family, prompt, edit, is_in_place=is_in_place)
            for name, value in ours.items():
                own = _own(name, value, number, len(prompt))
                assert difference([own], [expected[name]]) <= TOLERANCE, (edit, name)
            if edit is not None:
                logits = _own("logits", ours["logits"], number, len(prompt))
                assert difference([logits], [untouched[number]["logits"]]) > 10 * TOLERANCE, edit


def test_names_are_bare_hidden_states_and_slices_are_lists(served: Any) -> None:
    family, _, model = served
    total, width = FAMILIES[family].num_layers, FAMILIES[family].width
    with model.trace(PROMPTS):
        for name in OF_LAYERS:
            values = getattr(model, name)
            shape = (2, 4, 7, 7) if name == "attention_probabilities" else (2, 7, width)
            assert len(values) == total and [tuple(value.shape) for value in values] == [shape] * total, name
            assert isinstance(values[1:3], list) and len(values[1:3]) == 2
        last, same = model.layers_output[-1].save(), model.layers_output[total - 1].save()
        pair = polytrace.save(model.layers_output[1:3])
        second = model.layers_output(1).save()
        model.layers_output[:2] = [value * 2 for value in model.layers_output[:2]]
        twice = model.layers_output[1].save()
        probabilities, logits = model.next_token_probs.save(), model.logits.save()
        ids, mask = model.input_ids.save(), model.attention_mask.save()
        assert model.input_size == (2, 7)
    assert torch.equal(last, same) and torch.equal(pair[0], second) and not torch.equal(twice, second)
    assert torch.equal(probabilities, logits[:, -1].softmax(-1))
    assert ids[1, -4:].tolist() == PROMPTS[1] and mask.tolist() == [[1] * 7, [0] * 3 + [1] * 4]
    assert mask.dtype == torch.int64
    assert [layer._path for layer in model.layers] == [f"{FAMILIES[family].layers}.{n}" for n in range(total)]
    attention = f"{model.layers[1]._path}.{FAMILIES[family].attention}"
    assert model.attentions[1]._path == model.layers[1].self_attn._path == attention
    assert model.ln_final._path == FAMILIES[family].norm and model.embed_tokens._path == places(family)[NAMES[0]][0]
    assert len(model.attentions) == total and model.attentions[-1] == model.attentions[total - 1]
    if family != "opt":
        assert model.mlps[1] == model.layers[1].mlp == model.mlps[1:2][0]
        assert model.mlps[1]._path == f"{model.layers[1]._path}.mlp"


def test_what_attention_and_mlp_add_makes_up_the_residual(served: Any) -> None:
    _, _, model = served
    pairs = []
    with model.trace(PROMPTS):
        for layer in model.layers:
            layer.mlp_added[:, -1] *= 0.5
            made = layer.resid_pre + layer.attention_added + layer.mlp_added
            pairs.append((layer.resid_post.save(), made.save()))
        edited = model.logits.save()
    with model.trace(PROMPTS):
        bare = model.logits.save()
    assert all(difference([made], [last]) <= TOLERANCE for last, made in pairs) and len(pairs) == model.num_layers
    assert difference([edited[:, -1]], [bare[:, -1]]) > 10 * TOLERANCE


def test_facts_are_those_of_the_weights(served: Any) -> None:
    family, plain, model = served
    config = plain.config
    assert model.num_layers == FAMILIES[family].num_layers == config.num_hidden_layers
    assert model.num_heads == config.num_attention_heads == 4 and model.head_dim == 8
    assert model.num_kv_heads == (getattr(config, "num_key_value_heads", None) or 4)
    assert (model.hidden_size, model.vocab_size) == (32, 96)
    with pytest.raises(GraphError, match="num_heads cannot be set: it is a fact"):
        model.num_heads = 3


def test_functions_are_what_they_are_by_hand(served: Any) -> None:
    family, plain, model = served
    prompt, vector = PROMPTS[0], torch.randn(32, generator=torch.Generator().manual_seed(1))
    layers, norm = plain.get_submodule(FAMILIES[family].layers), plain.get_submodule(FAMILIES[family].norm)
    with model.trace(prompt):
        lens = model.project_on_vocab(model.layers_output[LAYER]).save()
    hidden = by_hand(plain, family, prompt, None)["layers_output"]
    with torch.no_grad():
        expected = plain.lm_head(norm(hidden))
    assert difference([lens], [expected]) <= TOLERANCE

    with model.trace(prompt):
        model.steer([2, 1], vector, factor=2.0, positions=[0, -1])
        steered = model.logits.save()
    with model.trace(prompt):
        model.skip_layers(1, -2)
        skipped = model.logits.save()
    with model.trace(prompt):
        model.skip_layer(2, skip_with=model.token_embeddings)
        replaced = model.logits.save()

    def steer(_module: Any, _args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, [0, -1]] += 2.0 * vector
        return out

    embeddings: list[Tensor] = []
    embedding = plain.get_submodule(places(family)["token_embeddings"][0])
    embedding.register_forward_hook(lambda _m, _a, out: embeddings.append(out.clone()))
    expected = _logits(plain, prompt, {layers[1]: steer, layers[2]: steer})
    assert difference([steered], [expected]) <= TOLERANCE
    given = {layer: lambda _m, args, _out: args[0] for layer in layers[1:3]}
    assert difference([skipped], [_logits(plain, prompt, given)]) <= TOLERANCE
    expected = _logits(plain, prompt, {layers[2]: lambda _m, _a, _o: embeddings[-1]})
    assert difference([replaced], [expected]) <= TOLERANCE
    bare = _logits(plain, prompt, {})
    assert all(difference([changed], [bare]) > 10 * TOLERANCE for changed in (steered, skipped, replaced))


def _logits(plain: Any, prompt: list[int], hooks: dict[Any, Any]) -> Tensor:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    with torch.no_grad():
        logits: Tensor = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def test_positions_of_steering_are_counted_in_each_prompt(of_family: Any) -> None:
    model, vector = of_family("llama"), torch.ones(32)
    with model.trace(PROMPTS):
        model.steer(LAYER, vector, positions=torch.tensor([0, 2]))
        together = model.logits.save()
    for number, prompt in enumerate(PROMPTS):
        with model.trace(prompt):
            model.layers_output[LAYER][:, [0, 2]] += vector
            alone = model.logits.save()
        assert torch.equal(together[number, -len(prompt) :], alone[0])
    with model.edit() as edited:
        edited.steer(None, vector, positions=-1)
    with edited.trace(PROMPTS[0]):
        later = edited.logits.save()
    with model.trace(PROMPTS[0]):
        for layer in range(model.num_layers):
            model.layers_output[layer][:, -1] += vector
        same = model.logits.save()
    assert torch.equal(later, same)


def test_an_operator_on_an_entry_is_an_edit_in_place(gpt2: Model) -> None:
    model = gpt2
    for write in ("model.layers_output[1] *= 2.0", "model.mlps_output[1][:] *= 2.0", "model.logits[:, -1] += 1.0"):
        with model.trace(PROMPTS[0]):
            exec(write, {"model": model})  # a line as a user writes it
            changed = model.logits.save()
        with model.trace(PROMPTS[0]):
            bare = model.logits.save()
        assert difference([changed], [bare]) > 1e-3, write


def test_probabilities_of_closest_tokens() -> None:
    model = polytrace.load("bench/tinyworld/model", threads=1)
    hidden = torch.randn(2, model.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = model.get_topk_closest_tokens(hidden, k=3)
    one = model.get_topk_closest_tokens(hidden[0], k=3)
    with model.trace():
        expected = model.lm_head(model.ln_final(hidden)).softmax(-1).save()
    values, tokens = expected.topk(3)
    assert list(one) == [model.tokenizer.id_to_token(int(token)) for token in tokens[0]]
    assert rows[0] == pytest.approx(one) and list(rows[1].values()) == pytest.approx(values[1].tolist())
    with pytest.raises(GraphError, match=r"are \[256\] or \[number, 256\], not \[1, 2, 256\]"):
        model.get_topk_closest_tokens(hidden[None])
    with pytest.raises(GraphError, match=r"project_on_vocab\(value\)\.softmax"), model.trace("The"):
        model.get_topk_closest_tokens(model.layers_output[0][0, -1])


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("model.attention_mask = 1", r"cannot be set: .* edit `model.layers\[i\].scores`"),
        ("model.attention_mask[:, 0] = 0; model.logits.save()", "reaches nothing: the mask tells tokens from pads"),
        ("model.input_ids = model.input_ids + 1", "tokens are known before it runs: give trace.* other ids, or assign"),
        ("model.input_ids[:, 0] = 3", "assign model.token_embeddings"),
        ("model.next_token_probs = 1", "write model.logits"),
        ("model.layers_output = 1", r"write one layer's, as in layers_output\[i\] = value"),
        ("model.attentions = 1", r"write attentions_input\[i\], attentions_output\[i\]"),
        ("model.attentions[0] = 1", "object does not support item assignment"),
        ("model.layers_output[4]", r"no layers_output\[4\]; this model has layers 0-3"),
        ("model.mlps_input[-5]", r"no mlps_input\[-5\]; this model has layers 0-3"),
        ("model.layers_output['a']", "layers are counted by integers, not by 'a'"),
        ("model.layers_output[:2] = [1]", r"2 layers takes a list with a value for each, not a list of 1"),
        ("model.skip_layers(2, 1)", "no layers from 2 to 1"),
        ("model.standard['norm']", "no norm: it is none of layers, embed_tokens"),
    ],
)
def test_mistakes_are_told_with_what_to_write(gpt2: Model, written: str, told: str) -> None:
    with pytest.raises((GraphError, TypeError), match=told), gpt2.trace([1, 2]):
        exec(written, {"model": gpt2})  # lines as a user writes them


def test_what_a_family_lacks_says_why_and_printing_shows_all(of_family: Any) -> None:
    opt, gemma = of_family("opt"), of_family("gemma2")
    with pytest.raises(AttributeError, match=r"no mlps\[0\]: its parts \(fc2, ...\) lie in the layer itself"):
        _ = opt.mlps[0]
    assert not hasattr(opt.layers[0], "mlp") and opt.attn_probs_available
    text = repr(opt)
    assert "mlps[0-3]: not here, its parts" in text and "layers: model.decoder.layers" in text
    assert "attentions[0-3]: modules, self_attn of each layer" in text and "num_heads: 4" in text
    assert {"layers", "layers_output", "attentions", "num_heads", "logits", "steer"} <= set(dir(opt))
    assert "mlp_output: [sequence, token, feature]; before post_feedforward_layernorm, which" in repr(gemma.layers[0])


def test_modules_by_nnterps_own_paths(gpt2: Model, of_family: Any) -> None:
    opt, llama = of_family("opt"), of_family("llama")
    assert gpt2.model.layers[1].self_attn == gpt2.transformer.h[1].attn and gpt2.model.ln_final == gpt2.ln_final
    assert gpt2.model == gpt2.transformer and opt.model.layers[0] == opt.model.decoder.layers[0]
    assert llama.model.layers[0] == llama.layers[0] and llama.model.norm == llama.ln_final


def test_what_a_user_renames_to_a_standard_name_takes_its_place(of_family: Any) -> None:
    model = of_family("gpt_neox", rename={"dense_h_to_4h": "inner", "gpt_neox.layers": "blocks"})
    own = of_family(
        "opt", rename={"fc2": "mlp", "self_attn.q_proj": "query", "self_attn_layer_norm": "before", "fc1": ["first"]}
    )
    assert model.blocks == model.layers and model.mlps[0].inner == model.layers[0].mlp.dense_h_to_4h
    assert own.mlps[2]._path == "model.decoder.layers.2.fc2"
    with own.trace(PROMPTS[0]):
        given, fc2 = own.mlps_output[2].save(), own.layers[2].fc2.output.save()
        taken, neurons = own.mlps_input[2].save(), own.layers[2].fc2.input.save()
    assert torch.equal(given, fc2) and torch.equal(taken, neurons)
    with pytest.raises(GraphError, match="the model has 'layers_output' already"):
        of_family("opt", rename={"model.decoder": "layers_output"})


def test_a_renamed_embedding_and_list_of_layers_are_what_the_names_mean(of_family: Any) -> None:
    renamed = of_family("gpt2", rename={"transformer.wpe": "embed_tokens", "transformer.ln_f": ["ln_final", "last"]})
    with renamed.trace(PROMPTS[0]):
        positions, expected = renamed.token_embeddings.save(), renamed.transformer.wpe.output.save()
    assert torch.equal(positions, expected) and renamed.standard["ln_final"] == renamed.last
    bare = of_family("gpt2", rename={"wpe": "embed_tokens", "h": "layers"})
    assert bare.embed_tokens == bare.transformer.wpe and bare.layers == bare.transformer.h
    with pytest.raises(GraphError, match=r"'ln_final' of the model would be 4 modules, transformer\.h\.0\.ln_1 and"):
        of_family("gpt2", rename={"ln_1": "ln_final"})
