"""One script for every family: a logit lens, head patching and steering. The model is the only thing that changes.

python examples/standard_names.py                                    # tinyworld, in this process
python examples/standard_names.py --model openai-community/gpt2      # or a Llama, a Gemma, a Mixtral, ...
python examples/standard_names.py --url http://127.0.0.1:8765        # on a service
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import polytrace


def logit_lens(model: Any, prompt: Any, top: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """What each layer would say next: the most likely tokens and how likely they are, `[layers, top]` each."""
    with model.trace(prompt):
        hidden = torch.cat([value[:, -1] for value in model.layers_output])  # [layers, hidden]
        probabilities, tokens = model.project_on_vocab(hidden).softmax(-1).topk(top)
        tokens.save(), probabilities.save()
    return tokens, probabilities


def head_patching(model: Any, clean: Any, corrupt: Any) -> torch.Tensor:
    """The last logits `[layers, heads, vocabulary]` when that head has found what it finds in the clean prompt.

    At the last token, so that each of these runs costs one row, from its layer on. All are one request.
    """
    rows = []
    with model.trace() as tracer:
        with tracer.invoke(clean):
            found = [layer.z[:, -1] for layer in model.layers]
        for number, layer in enumerate(model.layers):
            for head in range(model.num_heads):
                with tracer.invoke(corrupt):
                    layer.z[:, -1, head] = found[number][:, head]
                    rows.append(model.logits[:, -1].save())
    return torch.cat(rows).unflatten(0, (model.num_layers, model.num_heads))


def steering(model: Any, prompt: Any, toward: Any, away: Any, layer: int, factor: float) -> torch.Tensor:
    """The probabilities of the next token `[vocabulary]` when a layer's last token moves from one prompt to another."""
    with model.trace() as tracer:
        with tracer.invoke(toward):
            there = model.layers_output[layer][:, -1]
        with tracer.invoke(away):
            here = model.layers_output[layer][:, -1]
        with tracer.invoke(prompt):
            model.steer(layer, there - here, factor=factor, positions=-1)
            probabilities = model.next_token_probs.save()
    return probabilities[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="One script for every family")
    parser.add_argument("--url", help="of a service; without it the model is loaded in this process")
    parser.add_argument("--model", default="bench/tinyworld/model", help="a folder or hub id of any decoder")
    arguments = parser.parse_args()
    model = polytrace.connect(arguments.url) if arguments.url else polytrace.load(arguments.model)
    rome, moscow = "The Colosseum is in the city of", "The Kremlin is in the city of"

    print(f"{model.num_layers} layers of {model.num_heads} heads, {model.hidden_size} wide")
    for number, (tokens, probabilities) in enumerate(zip(*logit_lens(model, rome), strict=True)):
        guesses = [
            f"{model.tokenizer.decode([int(t)])!r} {float(p):.0%}" for t, p in zip(tokens, probabilities, strict=True)
        ]
        print(f"layer {number}: {', '.join(guesses)}")

    right, wrong = (model.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in (" Rome", " Moscow"))
    logits = head_patching(model, rome, moscow)
    leads = logits[..., right] - logits[..., wrong]
    layer, head = divmod(int(leads.argmax()), model.num_heads)
    with model.trace(moscow):
        logits = model.logits[0, -1]
        before = (logits[right] - logits[wrong]).save()
    print(f"head {head} of layer {layer} moves Rome's lead over Moscow most: {before:.1f} to {leads.max():.1f}")

    middle = model.num_layers - 2
    for factor in (0.0, 1.0, 2.0):
        probability = steering(model, moscow, rome, moscow, middle, factor)[right]
        print(f"steered by {factor:g} at layer {middle}: Rome is {float(probability):.0%} likely")


if __name__ == "__main__":
    main()
