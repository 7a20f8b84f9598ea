from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NewType

import pytest

from polytrace.codec import from_json, to_json
from polytrace.errors import WireError

Id = NewType("Id", str)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    selector: tuple[int | str, ...]
    colour: Colour = Colour.RED


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    id: Id
    count: int
    share: float
    inner: tuple[Inner, ...]
    by_name: Mapping[str, Inner | None]
    config: Mapping[str, Any]
    pair: tuple[int, str]
    is_on: bool = True
    notes: tuple[str, ...] = field(default=())


OUTER = Outer(
    id=Id("x"),
    count=3,
    share=-math.inf,
    inner=(Inner(selector=(0, "logits")), Inner(selector=(), colour=Colour.BLUE)),
    by_name={"a": None, "b": Inner(selector=("k",))},
    config={"deep": [{"x": 1.5}, None, "s"]},
    pair=(1, "b"),
)


def test_a_dataclass_survives_strict_json() -> None:
    plain = json.loads(json.dumps(to_json(OUTER), allow_nan=False))
    assert from_json(Outer, plain) == OUTER


def test_nan_survives() -> None:
    from dataclasses import replace

    assert math.isnan(from_json(Outer, to_json(replace(OUTER, share=math.nan))).share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, r"Outer.count is True where an integer"),
        ({"count": "3"}, r"Outer.count"),
        ({"count": 3.0}, r"Outer.count"),
        ({"share": None}, r"Outer.share"),
        ({"share": "infinite"}, r"Outer.share"),
        ({"inner": [{"selector": [0, 1.5]}]}, r"Outer.inner\[0\].selector\[1\]"),
        ({"inner": [{"selector": [], "colour": "green"}]}, "one of 'red', 'blue'"),
        ({"inner": [{}]}, "lacks the fields selector"),
        ({"pair": [1]}, "1 members where 2 belong"),
        ({"by_name": []}, "an object"),
        ({"more": 1}, "unknown fields: 'more'"),
        ({"is_on": 1}, "true or false"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        from_json(Outer, to_json(OUTER) | change)


def test_a_field_with_a_default_may_miss() -> None:
    plain = to_json(OUTER)
    del plain["is_on"]
    assert from_json(Outer, plain) == OUTER


def test_what_is_no_json_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="does not travel"):
        to_json({1, 2})
