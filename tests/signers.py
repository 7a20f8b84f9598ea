"""An identity provider for tests: a real HTTP server that publishes its keys, and real signatures with them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "polytrace"


class Signer:
    """Signs with keys that it publishes; `asked` counts how often somebody wanted them."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.published: list[dict[str, Any]] = []
        self.publish_rsa("first")
        self.asked = 0
        self.is_down = False
        self.calls_itself: str | None = None
        self.issuer = ""  # while it serves

    def publish_rsa(self, kid: str, **more: Any) -> None:
        self.published.append(RSAAlgorithm.to_jwk(self.rsa.public_key(), as_dict=True) | {"kid": kid} | more)

    def publish_ec(self, kid: str) -> None:
        self.published.append(ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True) | {"kid": kid, "use": "sig"})

    def claims(self, **other: Any) -> dict[str, Any]:
        """Good ones, but for these; None leaves one out."""
        now = int(time.time())
        found = {"iss": self.issuer, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300} | other
        return {name: value for name, value in found.items() if value is not None}

    def token(self, *, kid: str | None = "first", algorithm: str = "RS256", **other: Any) -> str:
        """A signed token."""
        key = self.ec if algorithm.startswith("ES") else self.rsa
        headers = {} if kid is None else {"kid": kid}
        return jwt.encode(self.claims(**other), key, algorithm=algorithm, headers=headers)

    def by_public_key(self) -> str:
        """A token whose HMAC is made with what everybody has: the provider's public key."""
        pem = self.rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        signed = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'first'})}.{_part(self.claims())}"
        return f"{signed}.{_base64(hmac.new(pem, signed.encode(), hashlib.sha256).digest())}"

    def unsigned(self) -> str:
        """A token that says that it needs no signature."""
        return f"{_part({'alg': 'none', 'typ': 'JWT', 'kid': 'first'})}.{_part(self.claims())}."

    @contextmanager
    def serving(self) -> Iterator[Signer]:
        """Published until the block ends."""
        signer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                signer.asked += self.path == "/keys"
                answers = {
                    "/.well-known/openid-configuration": {
                        "issuer": signer.calls_itself or signer.issuer,
                        "jwks_uri": f"{signer.issuer}/keys",
                    },
                    "/keys": {"keys": signer.published},
                }
                self.send_response(503 if signer.is_down else 200 if self.path in answers else 404)
                self.end_headers()
                self.wfile.write(json.dumps(answers.get(self.path)).encode())

            def log_message(self, *args: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _part(plain: dict[str, Any]) -> str:
    return _base64(json.dumps(plain).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
