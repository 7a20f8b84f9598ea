"""Where does a fact live? The residual of one prompt put into another, every layer and token, all in one trace.

python examples/patching.py
python examples/patching.py --url http://127.0.0.1:8765
"""

from __future__ import annotations

import argparse

import polytrace

parser = argparse.ArgumentParser(description="Where does a fact live?")
parser.add_argument("--url", help="of a service; without it the model is loaded in this process")
parser.add_argument("--model", default="bench/tinyworld/model", help="a folder or hub id of a Llama-shaped model")
arguments = parser.parse_args()

clean, right = "The Colosseum is in the city of", " Rome"
corrupt, wrong = "The Kremlin is in the city of", " Moscow"

model = polytrace.connect(arguments.url) if arguments.url else polytrace.load(arguments.model)
layers, lm_head = model.model.layers, model.lm_head
good, bad = (model.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (right, wrong))


def lead():
    """By how much the clean answer leads, at the last token."""
    logits = lm_head.output[:, -1]
    return (logits[:, good] - logits[:, bad]).save()


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

print(f"{len(leads)} patches in {len(tracer.receipt.passes)} pass; how much of {right!r} each brings back:")
tokens = tracer.tokens[0]
print(" " * 9 + "".join(f"{token:>11}" for token in tokens))
for number in reversed(range(len(layers))):
    row = leads[number * len(tokens) : (number + 1) * len(tokens)]
    shares = (round(float((value - least) / (most - least)), 2) + 0.0 for value in row)  # no -0.00
    print(f"layer {number:2} " + "".join(f"{share:11.2f}" for share in shares))
