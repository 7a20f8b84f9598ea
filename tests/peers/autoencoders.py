"""SAELens's side: `python -m peers.autoencoders FOLDER ...` runs each folder's SAE on its `x.safetensors`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def main(folders: list[Path]) -> None:
    from sae_lens import SAE

    for folder in folders:
        sae: Any = SAE.load_from_disk(folder)
        x = load_file(folder / "x.safetensors")["x"]
        with torch.no_grad():
            features = sae.encode(x)
            found = {"features": features.contiguous(), "out": sae(x).contiguous()}
        save_file(found, folder / "theirs.safetensors")


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
