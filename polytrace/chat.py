"""Conversations as prompts: the model's own chat template, rendered here as transformers' `apply_chat_template` does.

A conversation is a list of `{"role": ..., "content": ...}` messages. What may be said with `chat=`:
`add_generation_prompt` (unless said otherwise True, and False behind a message of the assistant's own),
`continue_final_message`, `tools`, `documents`, `chat_template` (the name of one of several, or a template), and
whatever variables the template has (`enable_thinking=False`). A template is a program that came with the model: it runs
in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from polytrace.description import ChatFormat
from polytrace.errors import GraphError
from polytrace.grammar import nearest
from polytrace.lines import user_line

_MARK = "POLYTRACE_CONTINUES_HERE "  # what stands behind a message that is to be continued, until it is cut there


def conversations_in(prompts: Any) -> list[Sequence[Any]] | None:
    """The conversations that prompts are; None for prompts of another kind."""
    if not isinstance(prompts, (list, tuple)) or not prompts:
        return None
    if all(_is_message(one) for one in prompts):
        return [prompts]
    if all(isinstance(one, (list, tuple)) and one and all(map(_is_message, one)) for one in prompts):
        return list(prompts)
    if any(_is_message(one) for one in prompts):
        raise GraphError("a conversation has messages {'role', 'content'} and nothing else", where=user_line())
    return None


def render(format: ChatFormat | None, messages: Sequence[Any], chat: Mapping[str, Any]) -> str:
    """One conversation as text, special tokens written out. Raises GraphError for what the template refuses."""
    options: dict[str, Any] = _plain(dict(chat))
    template = _chosen(format, options.pop("chat_template", None), options.get("tools"))
    plain: list[dict[str, Any]] = [
        {key: _plain(value) for key, value in message.items() if value is not None} for message in messages
    ]
    is_continued = options.pop("continue_final_message", False)
    is_answered = plain[-1].get("role") == "assistant"
    options.setdefault("add_generation_prompt", not is_answered and not is_continued)
    if is_continued and options["add_generation_prompt"]:
        raise GraphError("a message is continued, or another one is begun: not both", where=user_line())
    if is_continued:
        if not isinstance(plain[-1].get("content"), str):
            raise GraphError("continue_final_message: the last message has no text", where=user_line())
        plain[-1]["content"] += _MARK
    tokens = format.special_tokens if format is not None else {}
    variables = {"tools": None, "documents": None, **tokens, **options}
    text = _rendered(template, plain, variables)
    return _cut(text, plain[-1]["content"]) if is_continued else text


def _is_message(thing: Any) -> bool:
    return isinstance(thing, Mapping) and "role" in thing


def _plain(value: Any) -> Any:
    """A copy in dicts, lists, texts and numbers: a template of unknown origin gets no other object to call."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or type(value) in (str, bool, int, float):
        return value
    raise GraphError(
        f"messages and what chat= says are dicts, lists, texts and numbers, not a {type(value).__name__}",
        where=user_line(),
    )


def _chosen(format: ChatFormat | None, wanted: str | None, tools: Any) -> str:
    templates = format.templates if format is not None else {}
    if wanted is not None:
        if wanted not in templates and "{" not in wanted:
            close = nearest(wanted, templates) or f"; it has {', '.join(templates) or 'none'}"
            raise GraphError(f"this model has no chat template {wanted!r}{close}", where=user_line())
        return templates.get(wanted, wanted)
    if not templates:
        raise GraphError(
            "this model came without a chat template: give text or token ids, or chat={'chat_template': ...}",
            where=user_line(),
        )
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates:
        raise GraphError(
            f"this model has several chat templates and no default: choose of {', '.join(templates)} with "
            "chat={'chat_template': ...}",
            where=user_line(),
        )
    return templates["default"]


def _rendered(template: str, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
    compiled, failure = _compiled(template)
    try:
        return str(compiled.render(messages=messages, **variables))
    except (failure, TypeError, ValueError, KeyError, AttributeError) as error:  # what a template does is Python's
        raise GraphError(f"the chat template refuses this conversation: {error}", where=user_line()) from error


def _cut(text: str, content: str) -> str:
    """The text up to the end of the message that is continued, without spaces that the template took away."""
    place = text.rfind(_MARK.strip())
    if place < 0:
        raise GraphError(
            "continue_final_message: the template does not write the last message as it is, so there is no place to "
            "continue at",
            where=user_line(),
        )
    is_kept = text[place : place + len(_MARK)] == _MARK
    return text[:place] if is_kept else text[:place].rstrip()


@lru_cache(maxsize=16)
def _compiled(template: str) -> tuple[Any, type[Exception]]:
    """The template, and what it raises. Raises GraphError where Jinja is not installed or too old to be safe."""
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise GraphError(
            "conversations as prompts need jinja2: pip install 'jinja2>=3.1.6', or give text or token ids",
            where=user_line(),
        ) from None
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise GraphError(f"jinja2 {jinja2.__version__} has holes in its sandbox: it takes 3.1.6", where=user_line())
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_blocks(), loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = _namespace(jinja2)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template), jinja2.TemplateError
    except jinja2.TemplateSyntaxError as error:
        raise GraphError(f"the chat template cannot be read: {error}", where=user_line()) from error


def _namespace(jinja2: Any) -> Any:
    """Jinja's namespaces, without names that begin with an underscore: these reach what the sandbox is there for."""

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a template may not set {name!r}")
            super().__setitem__(name, value)

    return Namespace


def _generation_blocks() -> Any:
    """`{% generation %} ... {% endgeneration %}`: marks what the assistant says; as text it is what stands inside."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as its base has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
