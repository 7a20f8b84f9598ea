"""A disk that is full: what does not fit is refused with the reason, what was accepted stays, and it goes on when there
is room again. On a real file system of a few MiB.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gateways import ROOM, Agreeable, GatewayService, body, description_of_nothing, receipt_of, submit

from api.away import AwayError
from api.patience import patient
from api.status import RequestState
from cluster.requests import Finished
from polytrace.errors import CapacityError
from polytrace.wire import result_header
from scheduling.plan import RequestId

SIZE = 6 << 20
PATH = "/v1/models/m/requests"


class SmallDisk:
    """A file system of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, *, but: int = 0) -> None:
        """Nothing fits any more, or so many bytes."""
        with self._filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\1" * 4096)
        if but:
            os.truncate(self._filler, self._filler.stat().st_size - but)

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def service(disk: SmallDisk) -> Iterator[GatewayService]:
    service = GatewayService(disk.folder / "store", Agreeable(), description_of_nothing())
    yield service
    service.close()


def files(service: GatewayService) -> set[str]:
    return {path.stem for path in (service.store.folder / "requests").iterdir()}


def test_a_request_that_does_not_fit_is_refused_and_leaves_nothing(service: GatewayService, disk: SmallDisk) -> None:
    disk.fill(but=256 << 10)
    refused = service.http.post(PATH, content=b"\0" * (1 << 20))
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert "no room for the request: No space left on device" in refused.json()["detail"]
    assert files(service) == set()
    disk.free()
    accepted = service.http.post(PATH, content=body()).json()["id"]
    assert files(service) == {accepted}


def test_a_request_whose_state_does_not_fit_is_not_accepted(service: GatewayService, disk: SmallDisk) -> None:
    before = submit(service)
    disk.fill(but=8192)  # for its file, and none for the database's log
    answers = [service.http.post(PATH, content=body()) for _ in range(20)]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused and {answer.status_code for answer in answers} <= {202, 503}
    assert all(answer.headers["retry-after"] for answer in refused)
    accepted = {answer.json()["id"] for answer in answers if answer.status_code == 202}
    assert files(service) == accepted | {before}, "what was refused takes no room"
    disk.free()
    after = service.http.post(PATH, content=body())
    assert after.status_code == 202, "it goes on by itself"
    assert set(service.store.statuses([RequestId(one) for one in accepted])) == accepted
    assert service.store.num_open("m") == len(accepted) + 2
    service.finish(before)
    assert service.http.get(f"/v1/requests/{before}/result").status_code == 200


def test_a_result_that_does_not_fit_fails_its_own_request_with_the_number(
    service: GatewayService, disk: SmallDisk
) -> None:
    large, small = submit(service), submit(service)
    with pytest.raises(CapacityError, match=f"no room for a result of {SIZE + 64} bytes: No space left") as refused:
        service.store.place_result(large, 64, SIZE)
    service.store.finish([Finished(request=large, error=refused.value)])  # as the intake does
    service.finish(small)
    assert service.http.get(f"/v1/requests/{large}/result").status_code == 503
    assert service.http.get(f"/v1/requests/{small}/result").status_code == 200
    assert not service.store.result_path(large).exists()


def test_a_result_whose_state_does_not_fit_is_kept_when_there_is_room(service: GatewayService, disk: SmallDisk) -> None:
    request = submit(service)
    place = service.store.place_result(request, ROOM, 0)
    finished = Finished(request=request, header=result_header([], receipt_of(request), place.start))
    disk.fill()
    with pytest.raises(AwayError, match="cannot be written now"):
        for _ in range(1000):  # until the log that there is has no room left
            service.store.set_all_states(service.store.deployments()[0].state, "x" * 2000)
    waiting = threading.Thread(target=patient(service.store).finish, args=([finished],), daemon=True)
    waiting.start()
    time.sleep(1.0)
    status = service.store.status(request)
    assert status is not None and status.state is RequestState.RUNNING and waiting.is_alive()
    disk.free()
    waiting.join(timeout=10)
    assert service.http.get(f"/v1/requests/{request}/result").status_code == 200
