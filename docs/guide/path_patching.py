"""Path patching: does a head speak to the answer, or to other heads?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, num_heads = model.model.layers, model.config.num_attention_heads

# who receives? "Mary": the other one; in the corrupt prompts the other one gives
people = "Mary John, Tom Anna, Paul Lucy, Laura Frank, Simon Karen, Nina Oscar, Emily Mark, Jack Susan"
pairs = [pair.split() for pair in people.split(", ")]
clean = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in pairs]
corrupt = [f"When {a} and {b} went to the store, {a} gave a drink to" for a, b in pairs]
good, bad = (
    [model.tokenizer.encode(" " + name, add_special_tokens=False).ids[0] for name in names]
    for names in zip(*pairs, strict=True)
)


def lead():
    """By how much the right name leads, on average."""
    logits = model.lm_head.output[:, -1]
    return (logits[range(len(pairs)), good] - logits[range(len(pairs)), bad]).mean().save()


def freeze(first):
    """Everything of the last token behind attention in layer `first` says what it said in the clean run."""
    for number in range(first, len(layers)):
        if number > first:
            layers[number].self_attn.output[0][:, -1] = attention[number][:, -1]
        layers[number].mlp.output[:, -1] = mlp[number][:, -1]


# 1) one trace: each head's output from the corrupt run, with all behind it free (total), and frozen (direct)
total, direct = [], []
with model.trace() as tracer:
    with tracer.invoke(corrupt):
        other = [layer.self_attn.z for layer in layers]
    with tracer.invoke(clean):
        attention = [layer.self_attn.output[0] for layer in layers]
        mlp = [layer.mlp.output for layer in layers]
        plain = lead()
    for number, layer in enumerate(layers):
        for head in range(num_heads):
            for effects in (total, direct):
                with tracer.invoke(clean):
                    layer.self_attn.z[:, -1, head] = other[number][:, -1, head]
                    if effects is direct:
                        freeze(number)
                    effects.append(lead())
total, direct = (torch.stack(part).reshape(len(layers), num_heads) - plain for part in (total, direct))

# 2) the two heads that matter most without speaking to the answer: along which path do they matter?
senders = [divmod(place, num_heads) for place in (direct - total).flatten().topk(2).indices.tolist()]
with model.trace() as tracer:
    with tracer.invoke(corrupt):
        other = [layer.self_attn.z for layer in layers]
    with tracer.invoke(clean):
        attention = [layer.self_attn.output[0] for layer in layers]
        mlp = [layer.mlp.output for layer in layers]
    with tracer.invoke(clean):
        for number, head in senders:
            layers[number].self_attn.z[:, -1, head] = other[number][:, -1, head]
        both = lead()
    with tracer.invoke(clean):  # what later heads' queries and values get from these two alone
        for number, head in senders:
            layers[number].self_attn.z[:, -1, head] = other[number][:, -1, head]
        freeze(senders[0][0])
        only = lead()
        queries = [layer.self_attn.q_rot for layer in layers]
        values = [layer.self_attn.v for layer in layers]
    with tracer.invoke(clean):
        for layer, query in zip(layers, queries, strict=True):
            layer.self_attn.q_rot[:, -1] = query[:, -1]
        by_queries = lead()
    with tracer.invoke(clean):
        for layer, value in zip(layers, values, strict=True):
            layer.self_attn.v[:, -1] = value[:, -1]
        by_values = lead()

names = " and ".join(f"{number}.{head}" for number, head in senders)
print(f"the right name leads by {plain:.1f}; with heads {names} of the corrupt run by {both:.1f}")
for path, value in (("the answer", only), ("later queries", by_queries), ("later values", by_values)):
    print(f"  along the path to {path} alone: {value - plain:+.1f}")

figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for one, part, title in zip(axes, (total, direct), ("all that follows", "to the answer alone"), strict=True):
    image = one.imshow(part.numpy(), vmin=-4, vmax=4, cmap="RdBu", origin="lower")
    one.set_title(title)
    one.set_xlabel("head")
axes[0].set_ylabel("layer")
figure.colorbar(image, ax=axes, label="change of the lead")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert {number for number, _ in senders} == {2}
assert only - plain > -1 and both - plain < -10, "they do not speak to the answer"
assert by_queries - plain < -5 and (by_values - plain).abs() < 0.1, "they tell later heads where to look"
