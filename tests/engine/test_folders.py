"""What is refused before anything is loaded is what loading refuses, and nothing else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from transformers import AutoConfig

from api.settings import source_and_name
from engine.census import Census
from engine.folders import PLAIN, check_source, no_folder
from engine.loading import meta_model
from polytrace.errors import ServiceError


@pytest.mark.parametrize("family", PLAIN)
def test_a_split_is_refused_early_only_where_loading_refuses_it(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 6, "head_dim": 8, "vocab_size": 96, "pad_token_id": 0}
    AutoConfig.for_model(family, **sizes).save_pretrained(tmp_path)
    census = Census(meta_model(str(tmp_path)))
    refused = []
    for stages, ranks in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (1, 12)):
        try:
            check_source(str(tmp_path), stages=stages, ranks=ranks)
        except ServiceError:
            refused.append((stages, ranks))
            with pytest.raises(ServiceError):
                census.check(stages, ranks)
        else:
            census.check(stages, ranks)
    assert refused == [(3, 1), (1, 4), (1, 5), (1, 12)]


def test_what_is_not_known_passes(tmp_path: Path) -> None:
    check_source(str(tmp_path), stages=99, ranks=99)
    (tmp_path / "config.json").write_text('{"model_type": "jamba", "num_hidden_layers": 2}')
    check_source(str(tmp_path), stages=99, ranks=99)
    for source in ("gpt2", "openai-community/gpt2", "s3://bucket/models/x"):
        assert no_folder(source) is None
    assert no_folder(str(tmp_path / "gone")) == f"there is no folder {tmp_path}/gone, and a hub's id is owner/name"


def test_a_folder_that_cannot_be_looked_into_is_left_to_the_service() -> None:
    with tempfile.TemporaryDirectory() as made:
        closed = Path(made) / "closed"
        (Path(made) / "listless").mkdir()
        (closed / "m").mkdir(parents=True)
        closed.chmod(0o600)
        Path(made).chmod(0o311)
        is_root = os.geteuid() == 0
        try:
            if is_root:
                os.seteuid(65534)  # whose rights are looked at
            check_source(str(closed / "m"), stages=1, ranks=1)
            assert source_and_name(str(closed / "m"), None) == (str(closed / "m"), "m")
            with pytest.raises(ServiceError, match="there is no folder"):
                check_source(f"{made}/nosuch", stages=1, ranks=1)
        finally:
            if is_root:
                os.seteuid(0)
            Path(made).chmod(0o700)
            closed.chmod(0o700)
