"""Causal tracing: the subject is blurred by noise; which single state brings the fact back?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, num_noises = model.model.layers, 8
prompt, subject = "The Eiffel Tower is in the city of", slice(2, 4)  # the tokens of “Eiffel Tower”
answer = model.tokenizer.encode(" Paris", add_special_tokens=False).ids[0]

with model.trace(prompt) as tracer:
    spread = model.model.embed_tokens.output.std().save()
noise = 3 * spread * torch.randn(num_noises, 2, model.config.hidden_size, generator=torch.Generator().manual_seed(0))


def probability():
    """Of the answer, over the noises."""
    return model.lm_head.output[:, -1].softmax(-1)[:, answer].mean().save()


def residual(layer):
    return layer.output[0]


def mlp(layer):
    return layer.mlp.output


def attention(layer):
    return layer.self_attn.output[0]


# one trace: clean; blurred; and blurred with clean states: of one layer, or what MLPs or attention say in three
grids = {residual: [], mlp: [], attention: []}
with model.trace() as tracer:
    with tracer.invoke(prompt):
        kept = {state: [state(layer) for layer in layers] for state in grids}
        clean = probability()
    with tracer.invoke([prompt] * num_noises):
        model.model.embed_tokens.output[:, subject] += noise
        blurred = probability()
    for state, grid in grids.items():
        for middle in range(len(layers)):
            reach = 0 if state is residual else 1
            for position in range(len(tracer.tokens[0])):
                with tracer.invoke([prompt] * num_noises):
                    model.model.embed_tokens.output[:, subject] += noise
                    for number in range(max(0, middle - reach), min(len(layers), middle + reach + 1)):
                        state(layers[number])[:, position] = kept[state][number][:, position].expand(num_noises, -1)
                    grid.append(probability())

tokens = tracer.tokens[0]
maps = {state.__name__: torch.stack(grid).reshape(len(layers), len(tokens)) for state, grid in grids.items()}
end, last = subject.stop - 1, len(tokens) - 1
print(f"P(Paris): {clean:.2f} clean, {blurred:.2f} with the subject blurred; brought back by layer:")
for name, grid in maps.items():
    print(f"  {name:9} at the subject's end", " ".join(f"{value:.2f}" for value in grid[:, end].tolist()))
    print(f"  {'':9} at the last token   ", " ".join(f"{value:.2f}" for value in grid[:, last].tolist()))

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
for one, (name, grid) in zip(axes, maps.items(), strict=True):
    image = one.imshow(grid.numpy(), vmin=0, vmax=1, cmap="Purples", aspect="auto", origin="lower")
    one.set_title(f"clean {name}" + ("" if name == "residual" else ", three layers"))
    one.set_xticks(
        range(len(tokens)), [token + "*" if 2 <= at < 4 else token for at, token in enumerate(tokens)], rotation=60
    )
axes[0].set_ylabel("layer")
figure.colorbar(image, ax=axes, label="P(Paris)")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert clean > 0.9 and blurred < 0.2
assert maps["residual"][1, end] > 0.8 and maps["residual"][-2, last] > 0.8, "an early site and a late one"
assert maps["mlp"][:3, end].min() > 0.7 > 0.5 > maps["mlp"][3:, end].max(), "early MLPs at the subject's end"
assert maps["attention"][3:6, last].min() > 0.8, "attention in the middle takes it to the last token"
