"""A body over a dataset: where the model is surest, and in how many directions its last residuals lie.

python examples/dataset.py                                   # in this process
python examples/dataset.py --url http://127.0.0.1:8765       # on a service
python examples/dataset.py --to activations                  # rows too, as safetensors files; run it again: it goes on
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

import polytrace

parser = argparse.ArgumentParser(description="A body over a dataset")
parser.add_argument("--url", help="of a service; without it the model is loaded in this process")
parser.add_argument("--model", default="bench/tinyworld/model", help="a folder or hub id of a Llama-shaped model")
parser.add_argument("--to", help="a folder, or an address such as s3://bucket/activations")
arguments = parser.parse_args()

model = polytrace.connect(arguments.url) if arguments.url else polytrace.load(arguments.model)

PLACES = ("Eiffel Tower", "Colosseum", "Space Needle", "Brandenburg Gate")
FORMS = ("The {} is in", "The {} is in the city of", "Everyone visits the {} in", "Who has not seen the {}?")


def prompts() -> Iterator[str]:
    """They are made when they are needed: there could be millions."""
    for form in FORMS:
        for place in PLACES:
            yield form.format(place)


def body() -> dict[str, Any]:
    """Recorded once, for one prompt."""
    last = model.model.layers[-1].output[0][:, -1]
    surest = model.lm_head.output[:, -1].softmax(-1).amax(-1)
    return {"last": last, "spread": polytrace.covariance(last), "surest": polytrace.top_k(surest, 3)}


mapping = model.map(prompts(), body, to=arguments.to)
for part in mapping:
    print(f"prompts {part.prompts.start} to {part.prompts.stop - 1}: {list(part['last'].shape)}", part.path or "")

share = torch.linalg.eigvalsh(mapping.results["spread"]).flip(0).cumsum(0)
print(f"{int((share < 0.9 * share[-1]).sum()) + 1} directions hold 90% of the variance")
every = list(prompts())
for probability, number in zip(*mapping.results["surest"][:2], strict=True):
    print(f"{float(probability):.0%} sure: {every[int(number)]!r}")
