"""Conversations as prompts: the tokens of transformers' own `apply_chat_template`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import loaded, small_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from polytrace.chat import render
from polytrace.description import ChatFormat
from polytrace.errors import GraphError

# what templates in the wild do: loops with conditions, generation blocks, JSON, refusals, stripped blocks
TEMPLATE = """{{ bos_token }}
{%- if tools %}
    {{- '<tools> ' + tools | tojson + ' </tools> ' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {%- if loop.index0 > 5 %}
        {%- break %}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- ' <a> ' }}{% generation %}{{ message.content | trim }}{% endgeneration %}{{ ' </a>' }}
    {%- else %}
        {{- ' <' + message.role[0] + '> ' + message.content + ' </' + message.role[0] + '>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ' <a> ' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- 'now ' }}
    {%- endif %}
{%- endif %}"""
WORDS = "<unk> <bos> <pad> <s> </s> <u> </u> <a> </a> <tools> </tools> now you are a poet write me one line sure of"
ASKED = [{"role": "system", "content": "you are a poet"}, {"role": "user", "content": "write me one line"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": " sure of one "}]
SHORT = [{"role": "user", "content": "write"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(dict.fromkeys(WORDS.split()))}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    with loaded(small_llama(), folder) as made:
        yield made


@pytest.mark.parametrize(
    ("messages", "chat"),
    [
        (ASKED, {"add_generation_prompt": True}),
        (ASKED, {"add_generation_prompt": False}),
        (ASKED, {"add_generation_prompt": True, "enable_thinking": False}),
        (ANSWERED, {"add_generation_prompt": False}),
        (ANSWERED, {"continue_final_message": True, "add_generation_prompt": False}),
        (SHORT, {"tools": [{"name": "söng", "arguments": {"<": 1}}], "add_generation_prompt": True}),
        ([{"role": "user", "content": "write", "tool_calls": None}], {"add_generation_prompt": False}),
        (ANSWERED * 3, {"add_generation_prompt": True}),
    ],
)
def test_tokens_are_those_of_apply_chat_template(model: Any, tokenizer: Any, messages: Any, chat: Any) -> None:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **chat)
    assert model.render_chat(messages, **chat) == text
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **chat)["input_ids"]
    with model.trace(messages, chat=chat, run=False) as tracer:
        model.lm_head.output.save()
    assert tracer.request.invokes[0].sequences == (tuple(ids),)


def test_a_conversation_asks_for_an_answer_unless_it_ends_with_one(model: Any, tokenizer: Any) -> None:
    for messages, is_asked in ((ASKED, True), (ANSWERED, False)):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_asked)
        assert model.render_chat(messages) == text


def test_several_conversations_are_one_view_and_options_go_with_invokes(model: Any, tokenizer: Any) -> None:
    with model.trace([ASKED, SHORT]) as tracer:
        logits = model.lm_head.output[:, -1].save()
        lengths = tracer.lengths
    with model.trace() as tracer:
        with tracer.invoke(ASKED):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(SHORT, chat={"add_generation_prompt": False}):
            assert tracer.tokens[0][-1] == "</u>"
            second = model.lm_head.output[:, -1].save()
    assert lengths[0] > lengths[1] and torch.equal(logits[:1], first) and not torch.equal(logits[1:], second)


def test_a_batch_of_a_tokenizer_is_prompts_too(model: Any, tokenizer: Any) -> None:
    batch = tokenizer.apply_chat_template(
        [ASKED, SHORT], tokenize=True, return_dict=True, padding=True, return_tensors="pt", add_generation_prompt=True
    )
    with model.trace(batch, run=False) as from_batch:
        model.lm_head.output.save()
    with model.trace([ASKED, SHORT], run=False) as from_messages:
        model.lm_head.output.save()
    assert from_batch.request.invokes == from_messages.request.invokes


def test_what_the_template_refuses_is_the_users_error(model: Any) -> None:
    with pytest.raises(GraphError, match="refuses this conversation: no such role: poet") as error:
        model.trace([{"role": "poet", "content": "x"}])
    assert error.value.where is not None and error.value.where.startswith("test_chat.py")
    with pytest.raises(GraphError, match="no chat template 'rag'; it has default"):
        model.trace(ASKED, chat={"chat_template": "rag"})
    with pytest.raises(GraphError, match="and nothing else"):
        model.trace([ASKED[0], "text"])
    with pytest.raises(GraphError, match="chat= is for conversations"):
        model.trace("write", chat={"add_generation_prompt": True})
    with pytest.raises(GraphError, match="not both"):
        model.trace(ANSWERED, chat={"add_generation_prompt": True, "continue_final_message": True})


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with loaded(small_llama(), tmp_path) as model, pytest.raises(GraphError, match="without a chat template"):
        model.trace(ASKED)


def test_a_template_runs_in_a_sandbox() -> None:
    hostile = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    reaching = "{% set ns = namespace(a=1) %}{% set ns.__class__ = 1 %}"
    for template in (hostile, "{% set _ = messages.append(1) %}", reaching):
        with pytest.raises(GraphError, match="refuses this conversation"):
            render(ChatFormat(templates={"default": template}, special_tokens={}), SHORT, {})


def test_a_template_gets_plain_data_alone() -> None:
    plain = ChatFormat(
        templates={"default": "{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}"}, special_tokens={}
    )
    assert render(plain, SHORT, {}) == "2"
    with pytest.raises(GraphError, match="not a PosixPath"):
        render(plain, [{"role": "user", "content": Path("/etc/passwd")}], {})
    with pytest.raises(GraphError, match="not a function"):
        render(plain, SHORT, {"tools": [test_a_template_runs_in_a_sandbox]})


def test_a_template_that_breaks_is_told_as_such() -> None:
    for template, told in (("{% for %}", "cannot be read"), ("{{ 1 + messages }}", "refuses this conversation")):
        with pytest.raises(GraphError, match=told):
            render(None, SHORT, {"chat_template": template})


def test_several_templates_are_chosen_by_name(folder: Path) -> None:
    formats = ChatFormat(templates={"default": "d", "tool_use": "t", "rag": "r"}, special_tokens={})
    assert render(formats, SHORT, {}) == "d"
    assert render(formats, SHORT, {"tools": []}) == "t"
    assert render(formats, SHORT, {"chat_template": "rag"}) == "r"
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] == "<bos>"


def test_without_jinja_the_error_says_what_to_install(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polytrace import chat

    chat._compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(GraphError, match="pip install 'jinja2"):
        model.trace(ASKED)
