"""Calls and bytes that nobody foresaw, against a running gateway with the checks that a service has: no call breaks it,
and every answer is one that its own OpenAPI document tells of.

`make fuzz`, or POLYTRACE_FUZZ=1000 before pytest, looks far longer, each time at other examples; here it is a few, and
always the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from checking import InProcess
from fuzzing import broken_files
from gateways import GatewayService
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, CheckFunction
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from services import body, make_model

from engine.local import LocalBackend

EXAMPLES = int(os.environ.get("POLYTRACE_FUZZ", "0"))
CHECKS: list[CheckFunction] = [content_type_conformance, response_schema_conformance, status_code_conformance]
ENDS = ("/v1/models/{name}", "/v1/models/{name}/drain")  # what others use stays
search = settings(
    max_examples=EXAMPLES or 3,
    derandomize=not EXAMPLES,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayService]:
    folder = tmp_path_factory.mktemp("fuzzing")
    make_model(folder / "model")
    backend = LocalBackend(str(folder / "model"), name="m", threads=1)
    description = backend.describe()
    backend.close()
    checker = InProcess(folder / "store")
    service = GatewayService(folder / "store", checker, description, source=str(folder / "model"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def document(service: GatewayService) -> BaseSchema:
    whole = body(scale=2.0)
    schemathesis.openapi.media_type("application/vnd.safetensors", st.just(whole) | broken_files(whole))
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")

    @document.hook
    def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        """Half of the calls are about what there is."""
        about = context.operation
        is_harmless = about.method == "get" or about.path not in ENDS
        if (
            path_parameters
            and about.path.startswith("/v1/models/")
            and len(path_parameters["name"]) % 2
            and is_harmless
        ):
            path_parameters["name"] = "m"
        return path_parameters

    return document


def test_every_answer_is_one_that_the_document_tells_of(service: GatewayService, document: BaseSchema) -> None:
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) > 45
    for operation in operations:

        @search
        @given(case=operation.as_strategy())
        def called(case: Case) -> None:
            answer = case.call(timeout=30)
            case.validate_response(answer, checks=CHECKS)
            assert answer.status_code < 500 or (answer.status_code == 503 and "retry-after" in answer.headers)

        called()
    assert service.http.get("/readyz?model=m").status_code == 200


def test_of_no_bytes_the_checks_break(service: GatewayService) -> None:
    @search
    @given(broken_files(body(scale=2.0)))
    def sent(file: bytes) -> None:
        for route in ("validate", "requests"):
            answer = service.http.post(f"/v1/models/m/{route}", content=file)
            assert answer.status_code in (200, 202, 400, 409, 413, 422), answer.text
            if answer.status_code >= 400:
                assert answer.json()["detail"] and len(answer.content) < 5_000

    sent()


def test_of_no_question_the_checks_break(service: GatewayService) -> None:
    plain = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )

    @search
    @given(st.dictionaries(st.sampled_from(["prompt", "messages", "max_tokens", "polytrace", "stop", "n"]), plain))
    def asked(fields: dict[str, Any]) -> None:
        for path in ("completions", "chat/completions", "models/m/sites"):
            answer = service.http.post(f"/v1/{path}", json={"model": "m"} | fields)
            assert 400 <= answer.status_code < 500, answer.text

    asked()


@pytest.mark.parametrize(
    "told", ["[" * 100_000, '{"a":' * 100_000, '{"a":' * 900 + "1" + "}" * 900, "9" * 100_000, "NaN"]
)
def test_deep_nesting_of_a_question_is_the_callers_mistake(service: GatewayService, told: str) -> None:
    for question in (told, f'{{"inputs": {told}}}', f'{{"args": [{told}], "kwargs": {{"a": {told}}}}}'):
        answer = service.http.post("/v1/models/m/sites", content=question)
        assert answer.status_code in (400, 422), answer.text
        assert len(answer.content) < 2_000
