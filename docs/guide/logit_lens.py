"""Logit lens: what would each layer say next, if it were the last?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
prompt = "The Eiffel Tower is in the city of"

# one trace: the final norm and the head, called on every layer's output; a guess and its probability come back
guesses, probabilities = [], []
with model.trace(prompt) as tracer:
    for layer in model.model.layers:
        probability, token = model.lm_head(model.model.norm(layer.output[0])).softmax(-1).max(-1)
        guesses.append(token[0].save())
        probabilities.append(probability[0].save())

words = [[model.tokenizer.decode([int(token)]) for token in row] for row in guesses]
shares = torch.stack(probabilities)
for number, row in enumerate(words):
    print(f"layer {number}: {row[-1]!r} at {shares[number, -1]:.0%}")
first = next(number for number in range(len(words)) if all(row[-1] == " Paris" for row in words[number:]))
print(f"' Paris' is the first guess from layer {first} on")

figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="YlOrBr", aspect="auto", origin="lower")
for number, row in enumerate(words):
    for column, word in enumerate(row):
        color = "white" if shares[number, column] > 0.6 else "black"
        axes.text(column, number, word.strip(), ha="center", va="center", fontsize=8, color=color)
axes.set_xticks(range(len(words[0])), tracer.tokens[0])
axes.set_ylabel("layer")
axes.set_title("what each layer would say next, behind each token")
figure.colorbar(image, label="probability")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert words[-1][-1] == " Paris" and shares[-1, -1] > 0.9
assert first >= 2 and shares[3, -1] < 0.5 < shares[5, -1], "it becomes sure in the middle of the model"
