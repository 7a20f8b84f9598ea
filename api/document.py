"""The OpenAPI document, where the web framework cannot know what is true: bodies that routes read as they come, answers
that are files, what names and ids look like, how a call is refused, and that it needs a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from api.problems import MEDIA_TYPE as PROBLEM

Answers = dict[str, dict[str, Any] | None]

_FILE: dict[str, Any] = {"application/vnd.safetensors": {"schema": {"type": "string", "format": "binary"}}}
_JSON: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
_TEXT: dict[str, Any] = {"text/plain; charset=utf-8; version=0.0.4": {"schema": {"type": "string"}}}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_OWNER = r"^[a-z0-9][a-z0-9._@-]{0,62}$"
_PATTERNS = {
    "name": _NAME,
    "edit": _NAME,
    "tenant": _OWNER,
    "user": _OWNER,
    "request_id": "^[0-9a-f]{32}$",
    "digest": "^[0-9a-f]{64}$",
    "prefix": "^pt_[0-9a-f]{12}$",
}
_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/models/{name}/requests"): _FILE,
    ("post", "/v1/models/{name}/validate"): _FILE,
    ("post", "/v1/models/{name}/edits/{edit}"): _FILE,
    ("put", "/v1/constants/{digest}"): _FILE,
    ("post", "/v1/models/{name}/sites"): _JSON,
}
# What comes beside the answers that the routes declare, or in their place; None: nothing but the status.
_ANSWERS: dict[tuple[str, str], Answers] = {
    ("post", "/v1/models/{name}/requests"): {"200": _FILE, "202": _JSON},
    ("get", "/v1/requests/{request_id}/result"): {"200": _FILE, "202": _JSON, "206": _FILE, "416": None},
    ("get", "/v1/models/{name}"): {"304": None},
    ("get", "/v1/models/{name}/edits/{edit}"): {"200": _FILE, "304": None},
    ("get", "/v1/constants/{digest}"): {"200": _FILE, "206": _FILE, "304": None, "416": None},
    ("get", "/v1/kept/{name}/content"): {"200": _FILE, "206": _FILE, "304": None, "416": None},
    ("get", "/v1/states/{name}/content"): {"200": _FILE, "206": _FILE, "304": None, "416": None},
    ("get", "/v1/usage"): {"200": _JSON | {"text/csv": {"schema": {"type": "string"}}}},
    ("get", "/metrics"): {"200": _TEXT},
    ("put", "/v1/constants/{digest}"): {"201": None},
}
_WORDS = {
    "200": "What was asked for.",
    "201": "It is there.",
    "202": "It is not finished; how it stands.",
    "206": "The bytes that were asked for.",
    "304": "As the caller has it.",
    "416": "There are no such bytes.",
}
_OPEN = ("/healthz", "/readyz")  # for whoever asks
_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "where"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "what is wrong, with its numbers"},
        "code": {"type": "string"},
        "where": {"type": ["string", "null"], "description": "the user's own line"},
    },
}


def describe(app: FastAPI) -> None:
    """The app tells of itself what is true."""
    of_framework = app.openapi

    def told() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _mended(of_framework())
        return app.openapi_schema

    app.openapi = told  # type: ignore[method-assign]


def _mended(document: dict[str, Any]) -> dict[str, Any]:
    for path, method, call in _calls(document):
        if (body := _BODIES.get((method, path))) is not None:
            call["requestBody"] = {"required": True, "content": body}
        for parameter in call.get("parameters", ()):
            if parameter["in"] == "path" and parameter["name"] in _PATTERNS:
                parameter["schema"]["pattern"] = _PATTERNS[parameter["name"]]
        call["responses"].pop("422", None)  # what is wrong with a call is 400, and a problem like all others
        for status, content in _ANSWERS.get((method, path), {}).items():
            call["responses"][status] = {"description": _WORDS[status]} | (
                {} if content is None else {"content": content}
            )
        for answer in call["responses"].values():
            if PROBLEM in answer.get("content", {}):
                answer["content"] = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        if path not in _OPEN:
            call["security"] = [{"key": []}]
    parts = document.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = _PROBLEM_SCHEMA
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _calls(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            yield path, method, call
