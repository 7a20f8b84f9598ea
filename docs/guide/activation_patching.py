"""Activation patching: where is a fact, at which layer and token?"""

import os
from pathlib import Path

import polytrace
from polytrace.methods import heat_map, logit_difference, patch_activations

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
clean, right = "The Eiffel Tower is in the city of", " Paris"
corrupt, wrong = "The Galata Tower is in the city of", " Istanbul"

# the corrupt run with one residual of the clean one, for each layer and token
sweep = patch_activations(model, clean, corrupt, logit_difference(right, wrong), of="resid_post")
restored = sweep.effect

tokens = restored.position_token.values.tolist()
subject, end, last = tokens.index(" Eiffel"), tokens.index(" Tower"), len(tokens) - 1
for name, column in (("its name", subject), ("the subject's end", end), ("the last token", last)):
    shares = restored.sel(position=column).values
    print(f"{name:18}", " ".join(f"{share:5.2f}" for share in shares), " of the answer, by layer")
rows, alone = sweep.receipt.token_layers, sweep.receipt.token_layers_alone
print(f"{restored.size} patches cost {rows} rows of a layer; one by one they would cost {alone}")

figure = heat_map(restored, title="how much of “Paris” one residual of the clean run brings back", limits=(-1, 1))
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert restored[0, subject] > 0.5, "at first the fact is in the name"
assert restored[-1, last] > 0.99 and abs(restored[0, last]) < 0.01, "at the end it is in the last token"
assert restored[1, end] > 0.4 and restored[4, end] < 0.1, "early on it is also at the subject's end"
