"""A tiny LLaVA-style model in shared passes and as transformers runs it, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_kinds import KINDS

import polytrace

IMAGE, ROWS = 63, 4  # the token that stands for an image, and how often
TEXT = [5, 9, 2, 7]
PROMPT = [1, 2, *[IMAGE] * ROWS, 3, 4, 5]


class Imaged:
    def __init__(self, folder: Path) -> None:
        self.plain: Any = KINDS["llava"]()[0]
        self.folder = str(folder)
        self.plain.save_pretrained(folder)
        self.model: Any = polytrace.load(self.folder, whole=False, threads=1)
        generator = torch.Generator().manual_seed(1)
        self.photos = torch.randn(3, 3, 8, 8, generator=generator)
