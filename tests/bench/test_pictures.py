"""The pictures are drawn without a screen, whatever the tokens are."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from bench import pictures

TOKENS = ["<bos>", " $cost", "_^{", "\n", ""]


def test_a_logit_lens_is_a_picture_with_a_cell_for_each_layer_and_token(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lens.png"
    levels = [[0.0, 0.25, 0.5, 0.75, 1.0]] * 3
    pictures.draw_logit_lens(path, tokens=TOKENS, guesses=[TOKENS] * 3, probabilities=levels)
    with Image.open(path) as image:
        assert image.width > image.height > 200
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 50


def test_a_patching_map_shows_values_beyond_zero_and_one(tmp_path: Path) -> None:
    path = tmp_path / "patching.png"
    pictures.draw_patching(path, tokens=TOKENS, restored=[[-0.4, 0.0, 0.3, 1.0, 1.7]] * 2, clean="a $1", corrupt="b")
    with Image.open(path) as image:
        assert image.width > 400
