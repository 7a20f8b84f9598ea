"""Tenants, their users and terms in the store, and the audit log."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.audit import Audit
from api.identity import LOCAL, Identity, Role
from api.keys import Keys
from api.store import Store
from cluster.config import DeploymentSpec
from polytrace.errors import ConflictError, KeyRefusedError, NotFoundError, UserError

ADA = Identity(tenant="vision", user="ada")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    yield store
    store.close()


def test_the_default_tenant_is_always_there_and_others_are_added(store: Store) -> None:
    assert [one.name for one in store.tenants.known()] == ["default"]
    made = store.tenants.add("vision", LOCAL, weight=2.0, limits={"tokens_a_day": 1000}, models=("b", "a", "a"))
    assert store.tenants.get("vision") == made
    assert (made.weight, made.limits, made.models, made.is_disabled) == (2.0, {"tokens_a_day": 1000}, ("a", "b"), False)
    with pytest.raises(ConflictError, match="a tenant vision already"):
        store.tenants.add("vision", LOCAL)
    for name in ("", "..", "a/b", "Vision", "a~b", "a" * 64, "-x", "a\0b", "%2e%2e"):
        with pytest.raises(UserError, match="cannot be a tenant's name"):
            store.tenants.add(name, LOCAL)
    with pytest.raises(NotFoundError):
        store.tenants.get("nosuch")


def test_a_change_leaves_what_it_does_not_name(store: Store) -> None:
    tenants = store.tenants
    tenants.add("vision", LOCAL, weight=2.0, limits={"passes": 1, "tokens_a_day": 5}, models=("a",))
    changed = tenants.change("vision", LOCAL, limits={"passes": None, "request_bytes": 7})
    assert changed.limits == {"tokens_a_day": 5, "request_bytes": 7}
    assert (changed.weight, changed.models) == (2.0, ("a",))
    assert tenants.change("vision", LOCAL, models=()).models == (), "none is not all"
    assert tenants.change("vision", LOCAL, models=None, weight=0.5).models is None
    assert tenants.get("vision").weight == 0.5
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"weight": 0.0}, "it is from"),
        ({"weight": math.nan}, "it is from"),
        ({"weight": math.inf}, "it is from"),
        ({"limits": {"luck": 1}}, "'luck' is no limit; there are request_bytes"),
        ({"limits": {"passes": -1}}, "passes is -1"),
        ({"models": tuple(map(str, range(1001)))}, "at most 1000"),
    ]
    for terms, why in wrong:
        with pytest.raises(UserError, match=why):
            tenants.change("vision", LOCAL, **terms)
    assert tenants.get("vision").weight == 0.5
    with pytest.raises(NotFoundError):
        tenants.change("nosuch", LOCAL, weight=1.0)


def test_a_tenant_goes_with_its_users_and_keys_but_not_before_its_things(store: Store) -> None:
    keys = Keys(store._db)
    store.tenants.add("vision", LOCAL)
    store.tenants.add("visio", LOCAL)  # a name that the other one begins with
    _, secret = keys.make("vision", "ada", LOCAL)
    store.edits.put("m", "vision~ada", "e", b"1", is_shared=False)
    store.want(DeploymentSpec(name="m", source="none"))
    store.add(store.new_id(), "m", b"[]", work=1, max_open=9, caller=ADA)
    with pytest.raises(ConflictError, match=r"vision has 1 requests, 1 versions of edits: purge the tenant first"):
        store.tenants.remove("vision", LOCAL)
    assert keys.find(secret).identity.user == "ada", "nothing of it is gone"
    store.tenants.remove("visio", LOCAL)
    with store._db.transaction() as db:
        db.execute("DELETE FROM requests")
        db.execute("DELETE FROM edits")
    store.tenants.remove("vision", LOCAL)
    with pytest.raises(KeyRefusedError):
        keys.find(secret)
    assert [one.name for one in store.tenants.known()] == ["default"]
    store.tenants.add("vision", LOCAL)
    with pytest.raises(KeyRefusedError):
        keys.find(secret)
    assert store.tenants.users("vision") == []
    with pytest.raises(ConflictError, match="stays"):
        store.tenants.remove("default", LOCAL)
    with pytest.raises(NotFoundError):
        store.tenants.remove("nosuch", LOCAL)


def test_users_have_roles(store: Store) -> None:
    store.tenants.add("vision", LOCAL)
    assert store.tenants.set_user("vision", "ada", LOCAL).role is Role.USER
    store.tenants.set_user("vision", "ada", LOCAL, role=Role.OPERATOR)
    assert store.tenants.set_user("vision", "ada", LOCAL, is_disabled=True).role is Role.OPERATOR
    (ada,) = store.tenants.users("vision")
    assert (ada.name, ada.role, ada.is_disabled) == ("ada", Role.OPERATOR, True)
    with pytest.raises(NotFoundError):
        store.tenants.set_user("nosuch", "ada", LOCAL)
    with pytest.raises(NotFoundError):
        store.tenants.users("nosuch")
    with pytest.raises(UserError):
        store.tenants.set_user("vision", "../ada", LOCAL)


def test_every_change_is_written_down_with_it_and_none_that_failed(store: Store) -> None:
    audit = Audit(store._db)
    operator = Identity(tenant="ops", user="root", role=Role.OPERATOR, key="pt_123456789abc")
    store.tenants.add("vision", operator, weight=2.0)
    store.tenants.change("vision", operator, is_disabled=True)
    store.tenants.set_user("vision", "ada", operator, role=Role.OPERATOR)
    for refused in (lambda: store.tenants.add("vision", operator), lambda: store.tenants.remove("nosuch", operator)):
        with pytest.raises(UserError):
            refused()
    store.tenants.remove("vision", operator)
    audit.record(operator, "models.drain", "tiny", now=False)
    entries = audit.entries()
    assert [(one.act, one.subject) for one in reversed(entries)] == [
        ("tenants.add", "vision"),
        ("tenants.change", "vision"),
        ("users.set", "vision/ada"),
        ("tenants.remove", "vision"),
        ("models.drain", "tiny"),
    ]
    assert {one.actor for one in entries} == {"ops/root"}
    assert entries[1].details == {"key": "pt_123456789abc"}
    assert entries[2].details == {"role": "operator", "key": "pt_123456789abc"}
    assert entries[0].at >= entries[-1].at
    assert [one.seq for one in audit.entries(limit=2, before=entries[1].seq)] == [entries[2].seq, entries[3].seq]
