"""Keys in the store: found by what they begin with, refused for a reason, told once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.access import Access
from api.audit import Audit
from api.commands import app
from api.database import Database, open_database
from api.first_key import let_in
from api.identity import LOCAL, Identity, Role
from api.keys import MAX_ENDED, MAX_KEYS, Keys
from api.settings import ServeSettings, serve_settings
from api.tenants import Tenants
from polytrace.errors import ConflictError, KeyRefusedError, NotFoundError, UserError

ADA = Identity(tenant="default", user="ada")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = open_database(f"sqlite:///{tmp_path / 'store.db'}")
    yield database
    database.close()


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)


def test_a_key_is_found_by_its_holder_and_stored_nowhere(keys: Keys, database: Database, tmp_path: Path) -> None:
    made, secret = keys.make("default", "ada", LOCAL, label="laptop")
    holder = keys.find(secret)
    assert holder.identity == Identity(tenant="default", user="ada", role=Role.USER, key=made.prefix)
    assert secret.startswith(f"{made.prefix}_") and len(secret) == 59
    assert keys.known(tenant="default", user="ada") == [made]
    database.close()  # and with it the write-ahead log
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert made.prefix.encode() in stored and secret.encode() not in stored
    assert secret.removeprefix(made.prefix).encode() not in stored


def test_what_is_not_quite_a_key_is_none(keys: Keys) -> None:
    made, secret = keys.make("default", "ada", LOCAL)
    other, _ = keys.make("default", "ada", LOCAL)
    swapped = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    for wrong in (
        swapped,
        secret.replace(made.prefix, other.prefix),
        secret[:-1],
        f"{secret} ",
        f"{secret}\n",
        secret.upper(),
        made.prefix,
        "",
        "é" * 59,
        "pt_%_" + "_" * 43,
        f"pt_000000000000_{'A' * 43}",
    ):
        with pytest.raises(KeyRefusedError, match="does not know the key"):
            keys.find(wrong)


def test_a_key_is_refused_with_the_reason_once_it_has_ended(keys: Keys, database: Database) -> None:
    tenants = Tenants(database)
    tenants.add("vision", LOCAL)
    short, expired = keys.make("vision", "ada", LOCAL, expires=time.time() + 60)
    revoked, gone = keys.make("vision", "ada", LOCAL)
    _, good = keys.make("vision", "ada", LOCAL, expires=time.time() + 60)
    assert keys.find(expired).expires == short.expires
    ended(database, short.prefix)
    with pytest.raises(KeyRefusedError, match=r"expired at 20\d\d-\d\d-\d\d \d\d:\d\d UTC: make another"):
        keys.find(expired)
    first = keys.revoke(revoked.prefix, LOCAL)
    assert keys.revoke(revoked.prefix, LOCAL).revoked == first.revoked, "the first time counts"
    with pytest.raises(KeyRefusedError, match=f"{revoked.prefix} was revoked"):
        keys.find(gone)
    tenants.set_user("vision", "ada", LOCAL, is_disabled=True)
    with pytest.raises(KeyRefusedError, match="vision/ada is disabled"):
        keys.find(good)
    tenants.set_user("vision", "ada", LOCAL, is_disabled=False)
    tenants.change("vision", LOCAL, is_disabled=True)
    with pytest.raises(KeyRefusedError, match="vision is disabled"):
        keys.find(good)
    tenants.change("vision", LOCAL, is_disabled=False, models=("tiny",))
    identity = keys.find(good).identity
    assert identity.may_use("tiny") and not identity.may_use("large")
    tenants.set_user("vision", "ada", LOCAL, role=Role.OPERATOR)
    assert keys.find(good).identity.may_use("large")


def test_a_key_is_rotated_at_once_or_with_grace_and_lives_as_long(keys: Keys, database: Database) -> None:
    first, old = keys.make("default", "ada", LOCAL, label="ci", expires=time.time() + 1000)
    second, new = keys.rotate(first.prefix, ADA)
    with pytest.raises(KeyRefusedError, match="revoked"):
        keys.find(old)
    assert keys.find(new).identity.user == "ada" and second.label == "ci"
    assert second.expires is not None and 990 < second.expires - time.time() <= 1000
    with pytest.raises(ConflictError, match="not good any more"):
        keys.rotate(first.prefix, ADA)
    _, newest = keys.rotate(second.prefix, ADA, grace_s=60)
    left = keys.find(new).expires
    assert left is not None and 50 < left - time.time() <= 60
    ended(database, second.prefix)
    with pytest.raises(KeyRefusedError, match="expired"):
        keys.find(new)
    keys.find(newest)


def ended(database: Database, prefix: str) -> None:
    """A key's end, as if time had passed."""
    with database.transaction() as db:
        db.execute("UPDATE keys SET expires = ? WHERE prefix = ?", (time.time() - 1, prefix))


def test_a_key_that_expires_makes_none_that_outlives_it(keys: Keys) -> None:
    short, _ = keys.make("default", "ada", LOCAL, expires=time.time() + 50)
    long, _ = keys.make("default", "ada", LOCAL)
    by_short = Identity(tenant="default", user="ada", key=short.prefix)
    for made, _ in (
        keys.make("default", "ada", by_short),
        keys.make("default", "ada", by_short, expires=time.time() + 1e6),
        keys.rotate(long.prefix, by_short),
    ):
        assert made.expires == short.expires
    by_operator = Identity(tenant="default", user="ada", role=Role.OPERATOR, key=short.prefix)
    assert keys.make("default", "ada", by_operator)[0].expires is None


def test_whose_a_key_is_to_be_is_checked(keys: Keys) -> None:
    with pytest.raises(NotFoundError, match="no tenant 'nosuch'"):
        keys.make("nosuch", "ada", LOCAL)
    for name in ("", "..", "a/b", "../../etc", "Ada", "a~b", "a b", "a\0", ".hidden", "a" * 64, "a\n"):
        with pytest.raises(UserError, match="cannot be a user's name"):
            keys.make("default", name, LOCAL)
    keys.make("default", "ada", LOCAL)
    with pytest.raises(ConflictError, match="default/ada is user, not operator"):
        keys.make("default", "ada", LOCAL, role=Role.OPERATOR)
    with pytest.raises(UserError, match="printable"):
        keys.make("default", "ada", LOCAL, label="a\x1b[2J")
    with pytest.raises(UserError, match="expired already"):
        keys.make("default", "ada", LOCAL, expires=time.time() - 1)
    for prefix in ("", "pt_", "pt_000000000000", "' OR 1=1 --"):
        with pytest.raises(NotFoundError):
            keys.get(prefix)
        with pytest.raises(NotFoundError):
            keys.revoke(prefix, LOCAL)


def test_a_user_has_so_many_keys(keys: Keys, database: Database) -> None:
    made, _ = keys.make("default", "ada", LOCAL)
    with database.transaction() as db:
        db.executemany(
            "INSERT INTO keys (prefix, hash, tenant, user_name, created) VALUES (?, ?, 'default', 'ada', 0)",
            [(f"pt_{number:012x}", b"") for number in range(MAX_KEYS - 1)],
        )
    with pytest.raises(ConflictError, match="1000 keys, the most there can be: revoke some"):
        keys.make("default", "ada", LOCAL)
    keys.revoke(made.prefix, LOCAL)
    keys.make("default", "ada", LOCAL)
    with database.transaction() as db:  # all but one ended, most of them long ago
        db.execute("UPDATE keys SET revoked = 1 WHERE created = 0")
    keys.revoke(keys.make("default", "ada", LOCAL)[0].prefix, LOCAL)
    assert len(keys.known()) == 3, "what ended long ago is forgotten"
    with database.transaction() as db:
        db.executemany(
            "INSERT INTO keys (prefix, hash, tenant, user_name, created, revoked) "
            "VALUES (?, ?, 'default', 'ada', 0, ?)",
            [(f"pt_{number:012x}", b"", time.time()) for number in range(MAX_ENDED)],
        )
    with pytest.raises(ConflictError, match="keys that ended lately"):
        keys.make("default", "ada", LOCAL)


def test_the_first_start_on_loopback_makes_a_key_and_later_ones_none(keys: Keys) -> None:
    told = let_in(keys, ServeSettings(spec=None))
    assert told is not None
    secret = told.partition("export POLYTRACE_KEY=")[2]
    assert keys.find(secret).identity.is_operator
    again = let_in(keys, ServeSettings(spec=None, host="::1"))
    assert again is not None and "polytrace keys make" in again and "pt_" not in again
    assert len(keys.known()) == 1
    keys.revoke(keys.known()[0].prefix, LOCAL)
    assert "export" in str(let_in(keys, ServeSettings(spec=None, host="localhost")))


def test_another_address_needs_a_way_in_that_is_there_already(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "10.0.0.7", "node7.example"):
        with pytest.raises(UserError, match=r"polytrace keys make --operator --store .*POLYTRACE_KEY"):
            let_in(keys, ServeSettings(spec=None, host=host))
        assert let_in(keys, ServeSettings(spec=None, host=host, key="sesame")) is None
    assert keys.known() == []
    monkeypatch.setenv("POLYTRACE_OIDC_ISSUER", "https://id.example")
    monkeypatch.setenv("POLYTRACE_OIDC_AUDIENCE", "polytrace")
    assert let_in(keys, ServeSettings(spec=None, host="0.0.0.0")) is None
    monkeypatch.undo()
    keys.make("default", "ada", LOCAL, expires=time.time() + 60)
    assert let_in(keys, ServeSettings(spec=None, host="0.0.0.0")) is None


def test_a_key_of_the_store_in_the_services_own_variable_is_the_stores(keys: Keys, database: Database) -> None:
    made, secret = keys.make("default", "ada", LOCAL, role=Role.OPERATOR)
    access = Access(keys, Tenants(database), own_key=secret, asks=True)
    assert asyncio.run(access.identify(f"Bearer {secret}")).user == "ada"
    assert let_in(keys, ServeSettings(spec=None, host="0.0.0.0", key=secret)) is None
    keys.revoke(made.prefix, LOCAL)
    again = Access(keys, Tenants(database), own_key=secret, asks=False)  # the service was started again
    for header in (f"Bearer {secret}", ""):
        with pytest.raises(KeyRefusedError):
            asyncio.run(again.identify(header))
    with pytest.raises(UserError, match="no key yet"):
        let_in(keys, ServeSettings(spec=None, host="0.0.0.0", key=secret))
    other = Access(keys, Tenants(database), own_key=f"pt_0123456789ab_{'x' * 43}", asks=True)
    assert asyncio.run(other.identify(f"Bearer pt_0123456789ab_{'x' * 43}")) == LOCAL, "of another store"


def test_only_loopback_is_served_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTRACE_KEY", "sesame")
    with pytest.raises(UserError, match=r"--without-keys lets in whoever reaches 0\.0\.0\.0"):
        serve_settings(spec=None, key=None, asks_key=False, host="0.0.0.0", store="store")
    settings = serve_settings(spec=None, key=None, asks_key=False, host="127.0.0.1", store="store")
    assert settings.key is None and not settings.asks_key


def test_the_commands_make_the_first_key_of_a_fresh_store_and_write_it_down(tmp_path: Path) -> None:
    store = str(tmp_path / "fresh" / "store")

    def polytrace(*arguments: str) -> tuple[int, str, str]:
        answer = CliRunner().invoke(app, [*arguments, "--store", store])
        return answer.exit_code, answer.stdout, answer.stderr

    code, first, told = polytrace("keys", "make", "--operator", "--label", "ops")
    assert code == 0 and "of default/default, operator; it is shown only now" in told
    assert polytrace("tenants", "add", "vision", "--weight", "2", "--model", "tiny", "--limit", "passes=9")[0] == 0
    code, second, told = polytrace("keys", "make", "--tenant", "vision", "--user", "ada", "--expires", "90d")
    assert code == 0 and "of vision/ada, user, until 20" in told
    database = open_database(f"sqlite:///{store}/store.db")
    keys = Keys(database)
    assert keys.find(first.strip()).identity.is_operator
    ada = keys.find(second.strip())
    assert (ada.identity.tenant, ada.identity.user, ada.identity.role) == ("vision", "ada", Role.USER)
    assert ada.expires is not None and abs(ada.expires - time.time() - 90 * 86400) < 60
    assert Tenants(database).get("vision").limits == {"passes": 9}

    prefix = second[:15]
    code, shown, _ = polytrace("keys", "list")
    assert code == 0 and prefix in shown and "vision/ada" in shown and second.strip() not in shown
    of_ada, of_operator = (next(line for line in shown.splitlines() if one[:15] in line) for one in (second, first))
    assert " user " in of_ada and " operator " in of_operator
    code, shown, _ = polytrace("keys", "list", "--tenant", "vision", "--json")
    assert [(one["prefix"], one["role"]) for one in map(json.loads, shown.splitlines())] == [(prefix, "user")]
    code, third, _ = polytrace("keys", "rotate", prefix)
    assert code == 0 and keys.find(third.strip()).identity.user == "ada"
    assert polytrace("keys", "revoke", third[:15])[0] == 0
    with pytest.raises(KeyRefusedError):
        keys.find(third.strip())
    acts = [(entry.act, entry.subject) for entry in reversed(Audit(database).entries())]
    assert acts == [
        ("keys.make", first[:15]),
        ("tenants.add", "vision"),
        ("keys.make", prefix),
        ("keys.rotate", prefix),
        ("keys.revoke", third[:15]),
    ]
    code, shown, _ = polytrace("audit")
    assert code == 0 and "(store)/" in shown and "keys.rotate" in shown
    for wrong, why in (
        (("keys", "make", "--tenant", "nosuch"), "no tenant 'nosuch'"),
        (("keys", "make", "--expires", "soon"), "a number and s, m, h or d"),
        (("keys", "revoke", "../../store.db"), "nothing is at"),
        (("tenants", "add", "../x"), "nothing is at"),
        (("tenants", "set", "vision", "--limit", "passes"), "is not NAME=NUMBER"),
        (("tenants", "set", "vision", "--limit", "luck=1"), "'luck' is no limit"),
        (("tenants", "remove", "default"), "stays"),
    ):
        code, _, told = polytrace(*wrong)
        assert code == 1 and why in told and "Traceback" not in told, (wrong, told)
    database.close()
