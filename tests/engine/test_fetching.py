"""Models at a URL: once to a node, whole or not at all, and not before there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from counted_files import TALLY, register

from engine import fetching
from engine.checkpoint import weight_paths
from engine.fetching import MANIFEST, fetch, here, is_url
from polytrace.errors import ServiceError

ASK = """
import sys
from counted_files import register
from engine.fetching import fetch, here
register()
sys.stdin.readline()
folder = here(sys.argv[1])
for name in sys.argv[2:]:
    fetch(folder, name)
    print(f"{folder}/{name}")
"""
SIZES = {"model-1.safetensors": 3_000_000, "model-2.safetensors": 2_000_000, "config.json": 20}


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is reached by its URL."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for name, size in (SIZES | {"model.bin": 10, "modeling_own.py": 10, "evil name.json": 10}).items():
        (folder / name).write_bytes((name.encode() * size)[:size])
    (tmp_path / "tally").touch()
    monkeypatch.setenv(TALLY, str(tmp_path / "tally"))
    monkeypatch.setenv("POLYTRACE_WEIGHTS", str(tmp_path / "weights"))
    register()
    return folder


def got(remote: Path) -> Counter[str]:
    return Counter((remote.parent / "tally").read_text().split())


def test_processes_of_one_node_that_start_together_get_each_file_once(remote: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"}
    askers = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, f"counted://{remote}", *names],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for names in 2 * [["model-1.safetensors"], ["model-1.safetensors", "model-2.safetensors"]]
    ]
    for asker in askers:
        assert asker.stdin is not None
        asker.stdin.write("now\n")
        asker.stdin.flush()
    told = [asker.communicate(timeout=120)[0].split() for asker in askers]
    assert got(remote) == Counter(SIZES.keys()), "weights and small files once; no pickles, no programs, no odd names"
    assert {len(paths) for paths in told} == {1, 2}
    for path in (path for paths in told for path in paths):
        assert Path(path).read_bytes() == (remote / Path(path).name).read_bytes()
    (folder,) = {Path(path).parent for paths in told for path in paths}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {*SIZES, MANIFEST}
    assert not list(folder.glob(".*.part"))


def test_a_shard_that_needs_one_file_gets_one_and_local_folders_stay_where_they_are(remote: Path) -> None:
    folder = here(f"counted://{remote}")
    assert got(remote) == Counter(["config.json"])
    fetch(folder, "model-2.safetensors")
    fetch(folder, "../outside")
    assert got(remote) == Counter(["config.json", "model-2.safetensors"])
    assert weight_paths(folder) == [f"{folder}/model-2.safetensors"]
    fetch(str(remote), "model-1.safetensors")
    assert here(str(remote)) == str(remote) and here("owner/name") == "owner/name"
    assert is_url("s3://bucket/model") and is_url("simplecache::s3://bucket/model") and not is_url("C:model")


def test_a_content_that_changes_is_another_folder_and_the_copy_serves_while_nobody_answers(remote: Path) -> None:
    first = here(f"counted://{remote}")
    (remote / "config.json").write_text("{}")
    second = here(f"counted://{remote}")
    assert first != second and (Path(first) / "config.json").read_bytes() != b"{}"
    assert (Path(second) / "config.json").read_bytes() == b"{}"
    remote.rename(remote.with_name("elsewhere"))
    told: list[str] = []
    assert here(f"counted://{remote}", told.append) == second
    assert "cannot list counted://" in told[0] and "the copy on this node is taken" in told[0]
    with pytest.raises(ServiceError, match="cannot list"):
        here(f"counted://{remote}/other")


def test_nothing_is_got_that_the_disk_has_no_room_for_also_beside_others_on_their_way(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = here(f"counted://{remote}")
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    monkeypatch.setattr(fetching, "RESERVE_BYTES", free - 4_000_000)
    (Path(folder) / ".model-2.safetensors.part").touch()  # 2 of the 4 MB are somebody else's
    with pytest.raises(ServiceError, match=r"model-1\.safetensors has 3,000,000 bytes, and .* has room for [12],"):
        fetch(folder, "model-1.safetensors")
    assert got(remote) == Counter(["config.json"])
    assert not (Path(folder) / "model-1.safetensors").exists()


def test_a_file_that_is_not_as_long_as_it_was_said_to_be_is_not_taken(remote: Path) -> None:
    folder = here(f"counted://{remote}")
    for content, told in ((b"x" * 10, "has 10 bytes, and was to have 3,000,000"), (b"x" * 3_100_000, "is longer than")):
        (remote / "model-1.safetensors").write_bytes(content)
        with pytest.raises(ServiceError, match=told):
            fetch(folder, "model-1.safetensors")
        assert not list(Path(folder).glob("*model-1.safetensors*[!k]")), "neither the file nor a part"


def test_a_url_that_has_no_model_or_is_none_says_so(remote: Path) -> None:
    (remote / "config.json").unlink()
    with pytest.raises(ServiceError, match=r"has no config\.json"):
        here(f"counted://{remote}")
    with pytest.raises(ServiceError, match="nowhere://x"):
        here("nowhere://x")
