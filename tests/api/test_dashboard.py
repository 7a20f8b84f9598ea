"""The dashboard, the rules and the runbook name what a gateway tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gateways import Agreeable, GatewayService, description_of_nothing
from prometheus_client.parser import text_string_to_metric_families

DOCS = Path(__file__).parents[2] / "docs" / "service"
NAME = re.compile(r"\bpolytrace_[a-z_]+")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The names that a query may use, as a gateway that has just been started tells them."""
    service = GatewayService(tmp_path_factory.mktemp("docs") / "s", Agreeable(), description_of_nothing())
    found: set[str] = set()
    for family in text_string_to_metric_families(service.http.get("/metrics").text):
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + ending for ending in endings}
    yield found
    service.close()


def queries(board: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    return found + [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]


def test_every_query_of_the_dashboard_names_metrics_that_exist(told: set[str]) -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    found = queries(board)
    assert len(found) > 25
    for query in found:
        names = set(NAME.findall(query))
        assert names and names <= told, (query, names - told)
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}"), query
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and all(
        p["datasource"]["uid"] == "${datasource}" for p in board["panels"] if "targets" in p
    )


def test_every_rule_names_metrics_that_exist_and_a_chapter_of_the_runbook(told: set[str]) -> None:
    rules = [rule for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
    chapters = {line.removeprefix("### ") for line in (DOCS / "operating.md").read_text().splitlines()}
    assert len(rules) >= 9 and len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}, rule
        names = set(NAME.findall(rule["expr"]))
        assert names and names <= told, (rule["alert"], names - told)
        assert re.fullmatch(r"\d+[smh]", rule["for"]) and rule["labels"]["severity"] in ("page", "ticket")
        assert rule["alert"] in chapters and rule["annotations"]["runbook"] == f"operating.md#{rule['alert'].lower()}"


def test_the_runbooks_table_has_every_metric(told: set[str]) -> None:
    text = (DOCS / "operating.md").read_text()
    for braced in re.findall(r"`(polytrace_tenant_)\{([^}]*)\}(_total)`", text):
        text += " ".join(f"{braced[0]}{name}{braced[2]}" for name in braced[1].split(","))
    named = set(NAME.findall(text)) | {"polytrace_token_layers_saved_total"}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in told}
    assert families <= named, families - named
