"""Function vectors: a few heads carry the question; their sum, added elsewhere, asks it again."""

import os
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace
from bench.tinyworld.facts import RELATIONS

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, num_heads = model.model.layers, model.config.num_attention_heads
width = model.config.hidden_size // num_heads

capitals, languages = (
    next(relation.pairs for relation in RELATIONS if relation.name == name)
    for name in ("country_capital", "country_language")
)
ids = {capital: model.tokenizer.encode(" " + capital, add_special_tokens=False).ids for capital in capitals.values()}
countries = [country for country in capitals if country in languages and len(ids[capitals[country]]) == 1]
random.Random(0).shuffle(countries)
measured, held_out = countries[:36], countries[36:]


def capital_of(some):
    return torch.tensor([ids[capitals[country]][0] for country in some])


def asking(some):
    return [f"The capital of {country} is the city of" for country in some]


def other(some):
    return [f"People in {country} speak" for country in some]


def score():
    """How likely the capital is, on average, where the language is asked for."""
    return model.lm_head.output[:, -1].log_softmax(-1)[range(len(measured)), capital_of(measured)].mean().save()


# 1) one trace: what each head says at the last token when capitals are asked for, put in where languages are
effects = []
with model.trace() as tracer:
    with tracer.invoke(asking(measured)):
        means = [layer.self_attn.z[:, -1].mean(0).save() for layer in layers]
    with tracer.invoke(other(measured)):
        plain = score()
    for layer, mean in zip(layers, means, strict=True):
        for head in range(num_heads):
            with tracer.invoke(other(measured)):
                layer.self_attn.z[:, -1, head] = mean[head].expand(len(measured), -1)
                effects.append(score())
effects = torch.stack(effects).reshape(len(layers), num_heads) - plain
heads = [divmod(place, num_heads) for place in effects.flatten().topk(6).indices.tolist()]

# 2) the vector: what the six heads that matter most write into the residual; and as a control, six others
others = random.Random(1).sample(
    [divmod(at, num_heads) for at in range(effects.numel()) if divmod(at, num_heads) not in heads], 6
)
with model.trace("The"):
    vectors = [
        sum(
            layers[number].self_attn.o_proj.weight[:, head * width : (head + 1) * width] @ means[number][head]
            for number, head in chosen
        ).save()
        for chosen in (heads, others)
    ]

# 3) countries that were not measured: the vector is added once, at the last token of one layer
got = {"function vector": [], "six other heads": []}
with model.trace() as tracer:
    with tracer.invoke(other(held_out)):
        unchanged = model.lm_head.output[:, -1].argmax(-1).save()
    for rows, vector in zip(got.values(), vectors, strict=True):
        for layer in layers:
            with tracer.invoke(other(held_out)):
                layer.output[0][:, -1] += 2 * vector
                rows.append(model.lm_head.output[:, -1].argmax(-1).save())

shares = {name: (torch.stack(rows) == capital_of(held_out)).float().mean(-1).tolist() for name, rows in got.items()}
print(
    f"“{other(['France'])[0]}” is answered with the capital by {(unchanged == capital_of(held_out)).float().mean():.0%}"
)
print("heads that matter most:", ", ".join(f"{number}.{head}" for number, head in heads))
for name, row in shares.items():
    print(f"  with the {name:15} at layer", " ".join(f"{value:.2f}" for value in row))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
image = left.imshow(effects.numpy(), vmin=-3, vmax=3, cmap="RdBu_r", origin="lower")
left.set_title("what one head's mean adds to log P(capital)")
left.set_xlabel("head")
left.set_ylabel("layer")
figure.colorbar(image, ax=left)
for name, row in shares.items():
    right.plot(row, marker="o", label=name)
right.set_title("“People in … speak” answered with the capital")
right.set_xlabel("added at layer")
right.set_ylim(-0.02, 1.02)
right.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert (unchanged == capital_of(held_out)).float().mean() == 0
assert max(shares["function vector"]) > 0.9, "one vector asks another question, also of countries it was not made from"
assert max(shares["six other heads"]) < 0.1
