"""What would each layer say next? One trace; only the guesses come back.

python examples/logit_lens.py                                        # in this process
python examples/logit_lens.py --url http://127.0.0.1:8765            # on a service
python examples/logit_lens.py --prompt "The capital of Japan is"
"""

from __future__ import annotations

import argparse

import polytrace

parser = argparse.ArgumentParser(description="What would each layer say next?")
parser.add_argument("--url", help="of a service; without it the model is loaded in this process")
parser.add_argument("--model", default="bench/tinyworld/model", help="a folder or hub id of a Llama-shaped model")
parser.add_argument("--prompt", default="The Eiffel Tower is in the city of")
arguments = parser.parse_args()

model = polytrace.connect(arguments.url) if arguments.url else polytrace.load(arguments.model)

guesses = []
with model.trace(arguments.prompt) as tracer:
    for layer in model.model.layers:
        logits = model.lm_head(model.model.norm(layer.output[0][:, -1]))
        probability, token = logits.softmax(-1).max(-1)
        guesses.append((token.save(), probability.save()))

print(arguments.prompt, "...")
for number, (token, probability) in enumerate(guesses):
    print(f"  layer {number}: {model.tokenizer.decode([int(token)])!r} at {float(probability):.0%}")
print(f"{tracer.receipt.result_bytes} bytes came back; {tracer.receipt.read_bytes:,} were read")
