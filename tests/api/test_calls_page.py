"""docs/service/calls.md has every call of the gateway, and none that it does not have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pages import ROOT

from api.gateway import Gateway
from api.served import Checker
from api.settings import GatewaySettings
from api.store import Store


def test_the_page_of_calls_has_every_call(tmp_path: Path) -> None:
    store = Store(tmp_path)
    try:
        gateway = Gateway(store, GatewaySettings(store=str(tmp_path)), cast(Checker, None), "sesame")
        there = calls_of(gateway.app().openapi()["paths"])
    finally:
        store.close()
    told = calls_told((ROOT / "docs" / "service" / "calls.md").read_text())
    assert told - there == set(), "no such call"
    assert there - told == set(), "a call that the page does not have"


def calls_of(paths: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, str]]:
    """Methods and paths, whatever the names in these are."""
    return {(method.upper(), plain(path)) for path, methods in paths.items() for method in methods}


def calls_told(page: str) -> set[tuple[str, str]]:
    """Those in the first cells of the page's tables: some methods, and then their path."""
    found: set[tuple[str, str]] = set()
    for cell in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE):
        methods: list[str] = []
        for method, path in re.findall(r"\b(GET|POST|PUT|PATCH|DELETE)\b|(/[\w/{}.]+)", cell):
            if path:
                found.update((one, plain(path)) for one in methods)
                methods = []
            else:
                methods.append(method)
    return found


def plain(path: str) -> str:
    return re.sub(r"\{.*?\}", "{}", path)
