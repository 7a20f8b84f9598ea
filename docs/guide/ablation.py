"""Ablation: which heads does the model need to go on with a sequence that it has seen once?"""

import os
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, num_heads = model.model.layers, model.config.num_attention_heads

# eight sequences of random tokens, each said twice
rng = random.Random(0)
halves = [rng.sample(range(3, model.config.vocab_size), 16) for _ in range(8)]
prompts = [[0, *half, *half] for half in halves]
answers = torch.tensor(prompts)[:, 18:, None]


def loss():
    """What the second half costs, a token."""
    return -model.lm_head.output[:, 17:-1].log_softmax(-1).gather(-1, answers).mean()


# one trace: as it is, and once for each head, which says its mean over all tokens and prompts instead
ablated = []
with model.trace() as tracer:
    with tracer.invoke(prompts):
        plain = loss().save()
    for layer in layers:
        for head in range(num_heads):
            with tracer.invoke(prompts):
                z = layer.self_attn.z
                z[:, :, head] = z[:, :, head].mean((0, 1))
                ablated.append(loss().save())

harm = torch.stack(ablated).reshape(len(layers), num_heads) - plain
print(f"loss of the second half: {plain:.2f}")
for place in harm.flatten().topk(4).indices.tolist():
    layer, head = divmod(place, num_heads)
    print(f"without head {layer}.{head}: {plain + harm[layer, head]:.2f}")

figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
image = axes.imshow(harm.numpy(), cmap="Reds", origin="lower")
axes.set_xlabel("head")
axes.set_ylabel("layer")
axes.set_title("loss added when one head says its mean")
figure.colorbar(image)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

best = {divmod(place, num_heads) for place in harm.flatten().topk(2).indices.tolist()}
assert best == {(0, 0), (1, 0)}, "the head that looks one token back, and the induction head behind it"
assert harm[1, 0] > 5 and harm[2:].abs().max() < 0.1, "no later head matters"
