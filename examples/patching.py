"""Where does a fact live? The residual of one prompt put into another, every layer and token, all in one trace.

python examples/patching.py
python examples/patching.py --url http://127.0.0.1:8765
"""

from __future__ import annotations

import argparse

import polytrace
from polytrace.methods import logit_difference, patch_activations

parser = argparse.ArgumentParser(description="Where does a fact live?")
parser.add_argument("--url", help="of a service; without it the model is loaded in this process")
parser.add_argument("--model", default="bench/tinyworld/model", help="a folder or hub id")
arguments = parser.parse_args()

clean, right = "The Colosseum is in the city of", " Rome"
corrupt, wrong = "The Kremlin is in the city of", " Moscow"

model = polytrace.connect(arguments.url) if arguments.url else polytrace.load(arguments.model)
sweep = patch_activations(model, clean, corrupt, logit_difference(right, wrong), of="resid_post")

print(f"{sweep.effect.size} patches in {len(sweep.receipt.passes)} pass; how much of {right!r} each brings back:")
print(" " * 9 + "".join(f"{token:>11}" for token in sweep.effect.position_token.values))
for row in sweep.effect[::-1]:
    shares = (round(float(share), 2) + 0.0 for share in row)  # no -0.00
    print(f"layer {int(row.layer):2} " + "".join(f"{share:11.2f}" for share in shares))
