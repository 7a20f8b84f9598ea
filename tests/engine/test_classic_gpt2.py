"""The lines that GPT-2 tutorials have been written in for years, against hooks on the plain eager model.

`reorder_and_upcast_attn` makes the plain model call `attn_dropout` on its weights, which others of its formulas do by
function: so that a hook by hand sees them there.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import CONFIGS
from programs import difference
from torch import Tensor
from transformers import GPT2LMHeadModel

from engine.local import LocalBackend
from polytrace.errors import GraphError
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPT = [7, 3, 5, 9, 11, 2, 4]
VECTOR = torch.linspace(-2, 2, 32)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS["gpt2"])
    config.reorder_and_upcast_attn = True
    plain = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gpt2")
    plain.save_pretrained(folder)
    return plain, Model(LocalBackend(str(folder), threads=1))


def _by_hand(plain: Any, module: Any, change: Any, *, takes: bool) -> tuple[Tensor, Tensor]:
    """What a module takes or gives behind the change, and the logits."""
    seen: list[Tensor] = []

    def before(_module: Any, args: tuple[Tensor, ...]) -> None:
        change(args[0])
        seen.append(args[0].clone())

    def after(_module: Any, _args: Any, output: Any) -> None:
        change(output)
        seen.append(output.clone())

    handle = module.register_forward_pre_hook(before) if takes else module.register_forward_hook(after)
    with torch.no_grad():
        logits = plain(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    handle.remove()
    return seen[0], logits


def _zero(value: Any) -> None:
    value[:] = 0


def _steer(value: Any) -> None:
    value[:, -1, :] += VECTOR


def _nothing(value: Any) -> None:
    pass


@pytest.mark.parametrize("change", [_nothing, _zero, _steer])
def test_a_blocks_output_of_0_is_its_hidden_states(gpt2: Any, change: Any) -> None:
    plain, model = gpt2
    with model.trace(PROMPT):
        change(model.transformer.h[2].output[0])
        hidden = model.transformer.h[2].output[0].save()
        logits = model.output.logits.save()
    expected, wanted = _by_hand(plain, plain.transformer.h[2], change, takes=False)
    assert hidden.shape == (1, len(PROMPT), 32)
    assert difference([hidden, logits], [expected, wanted]) <= TOLERANCE
    if change is not _nothing:
        untouched = _by_hand(plain, plain.transformer.h[2], _nothing, takes=False)[1]
        assert difference([logits], [untouched]) > 1000 * TOLERANCE


def _knock_out(value: Any) -> None:
    value[:, 2, -1, 1:4] = 0.0


@pytest.mark.parametrize("change", [_nothing, _knock_out])
@pytest.mark.parametrize("form", ["input", "input[0][0]", "inputs[0][0]", "output"])
def test_what_attention_dropout_takes_is_the_weights(gpt2: Any, change: Any, form: str) -> None:
    plain, model = gpt2
    forms = {
        "input": lambda dropout: dropout.input,
        "input[0][0]": lambda dropout: dropout.input[0][0],
        "inputs[0][0]": lambda dropout: dropout.inputs[0][0],
        "output": lambda dropout: dropout.output,
    }
    with model.trace(PROMPT):
        dropout = model.transformer.h[1].attn.attn_dropout
        change(forms[form](dropout))
        weights = forms[form](dropout).save()
        pattern = model.transformer.h[1].attn.pattern.save()
        logits = model.output.logits.save()
    expected, wanted = _by_hand(plain, plain.transformer.h[1].attn.attn_dropout, change, takes=True)
    assert weights.shape == (1, 4, len(PROMPT), len(PROMPT)) and torch.equal(weights, pattern)
    assert difference([weights, logits], [expected, wanted]) <= TOLERANCE
    if change is not _nothing:
        untouched = _by_hand(plain, plain.transformer.h[1].attn.attn_dropout, _nothing, takes=True)[1]
        assert difference([logits], [untouched]) > 100 * TOLERANCE


@pytest.mark.parametrize("form", ["input", "input[0][0]", "output"])
def test_the_weights_are_assigned(gpt2: Any, form: str) -> None:
    plain, model = gpt2

    def even(value: Any) -> None:
        value[:] = value * 0.5

    with model.trace(PROMPT):
        dropout = model.transformer.h[1].attn.attn_dropout
        halved = dropout.input * 0.5
        if form == "input[0][0]":
            dropout.input[0][0] = halved
        else:
            setattr(dropout, form, halved)
        logits = model.output.logits.save()
    _, wanted = _by_hand(plain, plain.transformer.h[1].attn.attn_dropout, even, takes=True)
    _, untouched = _by_hand(plain, plain.transformer.h[1].attn.attn_dropout, _nothing, takes=True)
    assert difference([logits], [wanted]) <= TOLERANCE < difference([logits], [untouched]) / 100


WRONG: dict[str, Any] = {
    r"input\[1\]": lambda weights: weights[1],
    r"input\[0\]\[1\]": lambda weights: weights[0][1],
    r"input\[\(0, 2\)\]": lambda weights: weights[0, 2],
    r"input\[0\]\.sum": lambda weights: weights[0].sum(),
}


@pytest.mark.parametrize("told", WRONG)
def test_other_integers_there_are_refused_with_what_to_write(gpt2: Any, told: str) -> None:
    _, model = gpt2
    with pytest.raises(GraphError, match=told + r"`? means different things .* `input\[:, h\]`"), model.trace(PROMPT):
        WRONG[told](model.transformer.h[1].attn.attn_dropout.input)


def test_the_models_output_is_saved_whole_by_key_attribute_and_place(gpt2: Any) -> None:
    plain, model = gpt2
    with model.trace(PROMPT):
        output = model.output.save()
        by_name, by_place = model.output.logits.save(), model.output[0].save()
        attention = model.transformer.h[1].attn.output.save()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    for logits in (output.logits, output["logits"], output[0], by_name, by_place):
        assert difference([logits], [expected]) <= TOLERANCE
    assert isinstance(output, dict) and list(output) == ["logits"] and len(output.to_tuple()) == 1
    assert isinstance(attention, tuple) and attention[0].shape == (1, len(PROMPT), 32)
    with pytest.raises(AttributeError, match="what was saved has no 'logit'; it has logits"):
        _ = output.logit


_TUPLES: list[Any] = [
    lambda layer: (layer.output[0] * 2,),
    lambda layer: (layer.output[0] * 2, None),
    lambda layer: (layer.output[0] * 2, *layer.output[1:]),
    lambda layer: (layer.output[0] * 2,) + layer.output[1:],  # noqa: RUF005  as it is written
]


@pytest.mark.parametrize("written", _TUPLES)
def test_a_block_may_be_given_the_tuple_that_it_returned_once(gpt2: Any, written: Any) -> None:
    plain, model = gpt2
    with model.trace(PROMPT):
        model.transformer.h[2].output = written(model.transformer.h[2])
        logits = model.output.logits.save()
    _, wanted = _by_hand(plain, plain.transformer.h[2], lambda hidden: hidden.mul_(2), takes=False)
    assert difference([logits], [wanted]) <= TOLERANCE
    _, unchanged = _by_hand(plain, plain.transformer.h[2], _nothing, takes=False)
    assert difference([logits], [unchanged]) > 1e-2


def test_the_tuple_of_several_prompts_is_theirs_too_and_other_tuples_are_refused(gpt2: Any) -> None:
    _, model = gpt2
    layer = model.transformer.h[2]
    with model.trace([PROMPT, PROMPT]):
        layer.output = (layer.output[0] * 2,) + layer.output[1:]  # noqa: RUF005
        both = model.output.logits.save()
    with model.trace(PROMPT):
        layer.output = layer.output * 2
        one = model.output.logits.save()
    assert torch.equal(both, torch.cat([one, one]))
    with pytest.raises(GraphError, match="write the tensor alone"), model.trace([PROMPT, PROMPT]):
        layer.output = (layer.output[0], *layer.output[1:])
