"""What a service keeps outside its store: scratch folders that go with it, also when it was killed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from api.settings import ServeSettings
from api.supervisor import SCRATCH_MIN_AGE_S, open_log, scratch, where_it_keeps


def test_a_scratch_folder_is_this_users_alone_and_goes_with_its_block(tmp_path: Path) -> None:
    with scratch("some-", str(tmp_path)) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_service_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    left, unlocked, other = (tmp_path / name for name in ("some-left", "some-young", "other-left"))
    for folder in (left, unlocked, other):
        folder.mkdir()
        (folder / "lock").touch()
    with scratch("some-", str(tmp_path)) as living:
        for folder in (left, living, other):
            age(folder)
        with scratch("some-", str(tmp_path)) as next_one:
            assert set(tmp_path.iterdir()) == {unlocked, other, living, next_one}


def age(folder: Path) -> None:
    then = time.time() - 2 * SCRATCH_MIN_AGE_S
    os.utime(folder, (then, then))


def test_a_folder_that_goes_is_told_also_when_the_database_is_elsewhere(tmp_path: Path) -> None:
    goes = "without --store FOLDER that folder goes when the service ends"
    elsewhere = {"database": "postgresql://ada:hunter2@h/db", "objects": "s3://bucket"}
    told = where_it_keeps(ServeSettings(spec=None, **elsewhere), tmp_path)
    assert told == f"its store is {tmp_path}, its database and objects elsewhere, as it was said; {goes}"
    assert where_it_keeps(ServeSettings(spec=None), tmp_path) == f"its store is {tmp_path}; {goes}"
    for places in ({}, elsewhere):
        assert goes not in where_it_keeps(ServeSettings(spec=None, store=str(tmp_path), **places), tmp_path)


def test_logs_are_this_users_alone_also_those_of_an_older_version(tmp_path: Path) -> None:
    old = tmp_path / "gateway.log"
    old.write_text("before\n")
    old.chmod(0o644)
    for path in (old, tmp_path / "controller.log"):
        with open_log(path) as log:
            log.write(b"now\n")
        assert path.stat().st_mode & 0o777 == 0o600
    assert old.read_text() == "before\nnow\n"
