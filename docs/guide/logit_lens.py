"""Logit lens: what would each layer say next, if it were the last?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt

import polytrace
from polytrace import methods

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
prompt = "The Eiffel Tower is in the city of"

read = methods.logit_lens(model, prompt, positions=None, top_k=1)
words = read.token.isel(prompt=0, rank=0)  # layer x position
shares = read.probability.isel(prompt=0, rank=0)

for layer in words.layer.values:
    print(f"layer {layer}: {words.sel(layer=layer).values[-1]!r} at {shares.sel(layer=layer).values[-1]:.0%}")
last = words.values[:, -1]
first = next(layer for layer in range(len(last)) if all(last[layer:] == " Paris"))
print(f"' Paris' is the first guess from layer {first} on")

figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
image = axes.imshow(shares, vmin=0, vmax=1, cmap="YlOrBr", aspect="auto", origin="lower")
for layer, row in enumerate(words.values):
    for column, word in enumerate(row):
        color = "white" if shares[layer, column] > 0.6 else "black"
        axes.text(column, layer, word.strip(), ha="center", va="center", fontsize=8, color=color)
axes.set_xticks(range(shares.sizes["position"]), shares.position_token.values)
axes.set_ylabel("layer")
axes.set_title("what each layer would say next, behind each token")
figure.colorbar(image, label="probability")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert last[-1] == " Paris" and shares[-1, -1] > 0.9
assert first >= 2 and shares[3, -1] < 0.5 < shares[5, -1], "it becomes sure in the middle of the model"
