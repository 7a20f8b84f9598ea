"""Activation patching: where is a fact, at which layer and token?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
clean, right = "The Eiffel Tower is in the city of", " Paris"
corrupt, wrong = "The Galata Tower is in the city of", " Istanbul"
layers, lm_head = model.model.layers, model.lm_head
good, bad = (model.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (right, wrong))


def lead():
    """By how much the clean answer leads, at the last token."""
    logits = lm_head.output[:, -1]
    return (logits[:, good] - logits[:, bad]).save()


# one trace: the clean run, the corrupt run, and the corrupt run with one residual of the clean one, for each of them
leads = []
with model.trace() as tracer:
    with tracer.invoke(clean) as run:
        residuals = [layer.output[0] for layer in layers]
        most = lead()
    with tracer.invoke(corrupt):
        least = lead()
    for layer, residual in zip(layers, residuals, strict=True):
        for position in range(run.lengths[0]):
            with tracer.invoke(corrupt):
                layer.output[0][:, position] = residual[:, position]
                leads.append(lead())

tokens = tracer.tokens[0]
restored = ((torch.cat(leads) - least) / (most - least)).reshape(len(layers), len(tokens))
subject, end, last = tokens.index(" Eiffel"), tokens.index(" Tower"), len(tokens) - 1
for name, column in (("its name", subject), ("the subject's end", end), ("the last token", last)):
    print(f"{name:18}", " ".join(f"{share:5.2f}" for share in restored[:, column].tolist()), " of the answer, by layer")
rows, alone = tracer.receipt.token_layers, tracer.receipt.token_layers_alone
print(f"{len(leads)} patches cost {rows} rows of a layer; one by one they would cost {alone}")

figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
image = axes.imshow(restored.numpy(), vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto", origin="lower")
axes.set_xticks(
    range(len(tokens)), [a if a == b else f"{a}\n{b}" for a, b in zip(tokens, tracer.tokens[1], strict=True)]
)
axes.set_ylabel("layer")
axes.set_title("how much of “Paris” one residual of the clean run brings back")
figure.colorbar(image, label="logit difference restored")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert restored[0, subject] > 0.5, "at first the fact is in the name"
assert restored[-1, last] > 0.99 and restored[0, last].abs() < 0.01, "at the end it is in the last token"
assert restored[1, end] > 0.4 and restored[4, end] < 0.1, "early on it is also at the subject's end"
