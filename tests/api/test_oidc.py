"""Tokens of an identity provider: a real server publishes keys, real signatures are made with them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateways import Agreeable, GatewayService, description_of_nothing
from signers import AUDIENCE, Signer

from api.identity import LOCAL, Role
from api.oidc import Provider, Vouched
from api.settings import OidcSettings, oidc_settings
from polytrace.errors import CapacityError, KeyRefusedError, PolytraceError, UserError


@pytest.fixture
def signer() -> Iterator[Signer]:
    with Signer().serving() as signer:
        yield signer


def provider(signer: Signer, **other: Any) -> Provider:
    known = {"issuer": signer.issuer, "audience": AUDIENCE, "jwks_url": f"{signer.issuer}/keys", "cooldown_s": 60.0}
    return Provider(OidcSettings(**known | other))


def vouch(taker: Provider, *tokens: str) -> list[Vouched | str]:
    """Whom each token is for, or why it is refused."""

    async def all_of_them() -> list[Vouched | str]:
        found: list[Vouched | str] = []
        for token in tokens:
            try:
                found.append(await taker.vouch(token))
            except PolytraceError as error:
                found.append(f"{error.code}: {error.message}")
        return found

    return asyncio.run(all_of_them())


def test_a_signed_token_says_who_calls_and_the_keys_are_asked_for_once(signer: Signer) -> None:
    signer.publish_ec("second")
    taker = provider(signer)
    assert signer.asked == 0, "nothing is asked before the first token"
    tokens = [
        signer.token(),
        signer.token(kid="second", algorithm="ES256", sub="bob"),
        signer.token(algorithm="RS512"),  # the published key names no algorithm
        signer.token(algorithm="PS256"),
        signer.token(aud=["other", AUDIENCE]),
    ]
    found = vouch(taker, *tokens)
    assert [one.user for one in found if isinstance(one, Vouched)] == ["ada", "bob", "ada", "ada", "ada"], found
    assert all(isinstance(one, Vouched) and one.tenant == "default" and not one.is_operator for one in found)
    assert signer.asked == 1


def test_what_is_not_the_providers_word_for_this_service_now_is_refused(signer: Signer) -> None:
    now = int(time.time())
    other = Signer()
    other.issuer = signer.issuer
    good = signer.token()
    head, body, mark = good.split(".")
    tampered = f"{head}.{signer.token(sub='root').split('.')[1]}.{mark}"
    for token, why in (
        (signer.token(aud="elsewhere"), "not for this service, whose audience is polytrace"),
        (signer.token(aud=None), 'missing the "aud" claim'),
        (signer.token(iss="https://evil.example"), "it is not by http://127.0.0.1"),
        (signer.token(exp=now - 60), "expired: sign in again"),
        (signer.token(exp=None), 'missing the "exp" claim'),
        (signer.token(nbf=now + 3600), "not yet valid"),
        (signer.unsigned(), "signed by 'none'"),
        (signer.by_public_key(), "signed by 'HS256'"),
        (other.token(), "Signature verification failed"),
        (tampered, "Signature verification failed"),
        (f"{head}.{body}.", "Signature verification failed"),
        (signer.token(kid="nosuch"), "its key is none of the provider's"),
        (signer.token(kid=None), "does not say by which key"),
        (signer.token(algorithm="ES256"), "the token is refused"),  # the key of this name is RSA
        ("a.b.c", "it cannot be read"),
        ("..", "it cannot be read"),
    ):
        told, still_good = vouch(provider(signer), token, good)
        assert isinstance(told, str) and told.startswith("key-refused: ") and why in told, (token, told)
        assert isinstance(still_good, Vouched), "the neighbour of a bad token"


def test_a_secret_that_a_provider_publishes_by_mistake_signs_nothing(signer: Signer) -> None:
    import jwt

    secret = "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmU"
    signer.published.append({"kty": "oct", "k": secret, "kid": "oct", "alg": "HS256"})
    signer.publish_rsa("for-encryption", use="enc")
    forged = jwt.encode(signer.claims(), jwt.utils.base64url_decode(secret), algorithm="HS256", headers={"kid": "oct"})
    by_hmac, as_rsa, by_enc = vouch(
        provider(signer), forged, signer.token(kid="oct"), signer.token(kid="for-encryption")
    )
    assert "signed by 'HS256'" in str(by_hmac)
    assert "none of the provider's" in str(as_rsa) and "none of the provider's" in str(by_enc)


def test_claims_are_what_the_settings_say(signer: Signer) -> None:
    taker = provider(
        signer,
        user_claim="email",
        tenant_claim="https://uni.example/group",
        role_claim="realm_access.roles",
        operator_role="admin",
    )
    good = {"email": "ada@uni.example", "https://uni.example/group": "vision"}
    operator, user, missing, listed, upper, path = vouch(
        taker,
        signer.token(**good, realm_access={"roles": ["staff", "admin"]}),
        signer.token(**good, realm_access={"roles": ["administrator"]}, role="admin"),
        signer.token(email="ada@uni.example"),
        signer.token(**good | {"email": ["ada@uni.example"]}),
        signer.token(**good | {"email": "Ada@uni.example"}),
        signer.token(**good | {"https://uni.example/group": "../default"}),
    )
    assert isinstance(operator, Vouched) and isinstance(user, Vouched)
    assert (operator.tenant, operator.user, operator.is_operator) == ("vision", "ada@uni.example", True)
    assert not user.is_operator
    assert "'https://uni.example/group', which is the tenant here, is missing" in str(missing)
    assert "'email', which is the user here, is missing or no text" in str(listed)
    assert "'Ada@uni.example' cannot be a user's name" in str(upper), "who differs in case only is somebody else"
    assert "cannot be a tenant's name" in str(path)


def test_a_new_key_is_fetched_when_a_token_names_it_but_not_for_every_token(signer: Signer) -> None:
    taker = provider(signer, cooldown_s=0.3)
    vouch(taker, signer.token())
    signer.publish_ec("new")
    time.sleep(0.3)
    (found,) = vouch(taker, signer.token(kid="new", algorithm="ES256"))
    assert isinstance(found, Vouched) and signer.asked == 2

    slow = provider(signer)
    told = vouch(slow, *(signer.token(kid=f"made-up-{number}") for number in range(20)), signer.token())
    assert all("none of the provider's" in str(one) for one in told[:20]) and isinstance(told[20], Vouched)
    assert signer.asked == 3, "junk does not make the service ask"


def test_all_who_come_at_once_wait_for_one_answer(signer: Signer) -> None:
    taker = provider(signer)

    async def at_once() -> list[Vouched]:
        return await asyncio.gather(*(taker.vouch(signer.token(sub=f"user{number}")) for number in range(20)))

    assert {one.user for one in asyncio.run(at_once())} == {f"user{number}" for number in range(20)}
    assert signer.asked == 1


def test_while_the_provider_is_away_its_keys_hold_and_without_any_it_is_said(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker, fresh = provider(signer, cooldown_s=0.0), provider(signer)
    vouch(taker, signer.token())
    signer.is_down = True
    assert isinstance(vouch(taker, signer.token())[0], Vouched)
    told = vouch(fresh, signer.token(), signer.token())
    assert all("capacity: the identity provider" in str(one) and "try again later" in str(one) for one in told)
    monkeypatch.setattr("api.oidc.LIFE_S", -1.0)  # old: asked for again, and used meanwhile
    assert isinstance(vouch(taker, signer.token())[0], Vouched)
    monkeypatch.setattr("api.oidc.MAX_AGE_S", -1.0)  # too old to be trusted
    assert "does not give its keys" in str(vouch(taker, signer.token())[0])
    monkeypatch.undo()
    signer.is_down = False
    assert isinstance(vouch(taker, signer.token())[0], Vouched)


def test_a_key_that_the_provider_takes_back_is_refused_once_the_keys_were_asked_for_again(
    signer: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    taker = provider(signer, cooldown_s=0.0)
    vouch(taker, signer.token())
    signer.published.clear()
    signer.publish_ec("second")
    monkeypatch.setattr("api.oidc.LIFE_S", -1.0)

    async def twice() -> None:
        await taker.vouch(signer.token())
        while taker._fetch is not None:
            await asyncio.sleep(0.01)
        with pytest.raises(KeyRefusedError, match="none of the provider's"):
            await taker.vouch(signer.token())

    asyncio.run(twice())


def test_a_provider_that_says_it_is_another_is_not_believed(signer: Signer) -> None:
    signer.calls_itself = "https://evil.example"
    with pytest.raises(CapacityError, match="does not give its keys"):
        asyncio.run(provider(signer, jwks_url=None).vouch(signer.token()))
    signer.calls_itself = None
    assert asyncio.run(provider(signer, jwks_url=None).vouch(signer.token())).user == "ada"


def test_the_settings_are_whole_and_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oidc_settings() is None
    monkeypatch.setenv("POLYTRACE_OIDC_ISSUER", "https://id.example")
    with pytest.raises(UserError, match="needed together"):
        oidc_settings()
    monkeypatch.setenv("POLYTRACE_OIDC_AUDIENCE", AUDIENCE)
    assert oidc_settings() == OidcSettings(issuer="https://id.example", audience=AUDIENCE)
    monkeypatch.setenv("POLYTRACE_OIDC_JWKS_URL", "http://id.example/keys")
    with pytest.raises(UserError, match=r"http://id\.example/keys is not https"):
        oidc_settings()
    monkeypatch.delenv("POLYTRACE_OIDC_JWKS_URL")
    monkeypatch.setenv("POLYTRACE_OIDC_TENANT", "../x")
    with pytest.raises(UserError, match="cannot be a tenant's name"):
        oidc_settings()


def test_a_token_comes_in_beside_keys_in_a_tenant_that_is_known_only(signer: Signer, tmp_path: Path) -> None:
    settings = OidcSettings(issuer=signer.issuer, audience=AUDIENCE, tenant_claim="org", role_claim="roles")
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), oidc=settings)
    tenants = service.store.tenants
    tenants.add("vision", LOCAL, models=("m",))
    try:

        def who(token: str) -> dict[str, object]:
            answer = service.http.get("/v1/whoami", headers={"Authorization": f"Bearer {token}"})
            found: dict[str, object] = answer.json() | {"status_code": answer.status_code}
            return found

        ada = {"tenant": "vision", "user": "ada", "role": "user", "key": None, "models": ["m"], "status_code": 200}
        assert who(signer.token(org="vision")) == ada
        assert who(signer.token(org="vision", roles=["polytrace-operator"]))["role"] == "operator"
        unknown = who(signer.token(org="nosuch"))
        assert unknown["status_code"] == 401 and "no tenant nosuch" in str(unknown["detail"])
        assert who("nonsense")["status_code"] == 401
        made = service.http.post(
            "/v1/keys", json={}, headers={"Authorization": f"Bearer {signer.token(org='vision')}"}
        ).json()
        assert who(made["secret"]) == ada | {"key": made["prefix"]}, "the same user by key"

        tenants.set_user("vision", "ada", LOCAL, role=Role.OPERATOR)
        assert who(signer.token(org="vision", jti="1"))["role"] == "operator"
        tenants.set_user("vision", "ada", LOCAL, is_disabled=True)
        disabled = who(signer.token(org="vision", jti="2"))
        assert disabled["status_code"] == 401 and "vision/ada is disabled" in str(disabled["detail"])
    finally:
        service.close()


def test_a_provider_that_is_away_is_503_and_keys_go_on(signer: Signer, tmp_path: Path) -> None:
    settings = OidcSettings(issuer=signer.issuer, audience=AUDIENCE)
    service = GatewayService(tmp_path / "store", Agreeable(), description_of_nothing(), oidc=settings, key="sesame")
    signer.is_down = True
    try:
        answer = service.http.get("/v1/whoami", headers={"Authorization": f"Bearer {signer.token()}"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert service.http.get("/v1/whoami").json()["role"] == "operator"
    finally:
        service.close()
