"""A service on somebody's laptop: nobody gave it a key, and it printed one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from services import Service, fresh_environment, wait_until


class Laptop:
    """A service that was given no key, and the one that it printed."""

    def __init__(self, model: Path, folder: Path, *flags: str, **environment: str) -> None:
        self.service = Service(model, folder, *flags, POLYTRACE_KEY="", **environment)
        self.folder = folder
        self.url = str(self.service.http.base_url)

    def start(self) -> None:
        """Returns when it is ready."""
        wait_until(lambda: "export POLYTRACE_KEY=" in self.printed(), 60, self.service)
        found = re.search(r"export POLYTRACE_KEY=(pt_\S+)", self.printed())
        assert found is not None
        self.key = found[1]
        self.service.http.headers["Authorization"] = f"Bearer {self.key}"
        wait_until(self.service.is_ready, 240, self.service)

    def printed(self) -> str:
        return (self.folder / "serve.log").read_text()

    def polytrace(
        self, *arguments: str, key: str | None = None, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        environment = fresh_environment(self.folder) | {"POLYTRACE_URL": self.url, "POLYTRACE_KEY": key or self.key}
        command = [sys.executable, "-m", "api.commands", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)

    def made(self, *arguments: str) -> str:
        answer = self.polytrace("keys", "make", *arguments)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()
