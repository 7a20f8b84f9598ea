"""S3 on this machine: moto's server, spoken to by s3fs as any other."""

from __future__ import annotations

import os
import secrets
from typing import Any

from moto.server import ThreadedMotoServer

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "sesame",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",
}


class S3:
    """A server in a thread of this process; its environment is set while it is there."""

    def __init__(self) -> None:
        self._port = 0
        self.start()
        self.environment = ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._port}"}
        self._before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        self.system().makedirs("/tests", exist_ok=True)  # one of an earlier server in this process is there still

    def start(self) -> None:
        """Again with all that was there: what it holds is this process'."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        self._port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        """Nobody answers."""
        self._server.stop()

    def system(self) -> Any:
        """s3fs, as another program would use it."""
        import s3fs

        return s3fs.S3FileSystem(use_listings_cache=False)

    def place(self) -> str:
        """The URL of a new and empty place of objects."""
        return f"s3://tests/{secrets.token_hex(4)}"

    def close(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._server.stop()
