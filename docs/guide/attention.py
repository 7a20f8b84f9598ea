"""Attention: where does a head look, and what if the model must not look there?"""

import os
import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import knock_out_attention, line_plot, probability

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, num_heads = model.model.layers, model.config.num_attention_heads

# 1) patterns: how much of its attention does a head give to what came after the last time? One number a head comes back
length = 12
half = random.Random(0).sample(range(3, model.config.vocab_size), length)
rows = torch.arange(1 + length, 1 + 2 * length)
with model.trace([[0, *half, *half]]):
    scores = [layer.self_attn.pattern[0, :, rows, rows - length + 1].mean(-1).save() for layer in layers]
    pattern = layers[1].self_attn.pattern[0, 0].save()
scores = torch.stack(scores)
best, second = scores.flatten().topk(2).values.tolist()
layer, head = divmod(int(scores.argmax()), num_heads)
print(f"head {layer}.{head} gives {best:.0%} to what came after the last time; the next best head {second:.0%}")

# 2) knockout: the last token must not see the subject, in three neighbouring layers at a time
landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
encode = model.tokenizer.encode
facts = {one: " " + city for one, city in landmarks.items() if len(encode(" " + city, add_special_tokens=False)) == 1}
subjects, cities = (list(part)[:40] for part in (facts.keys(), facts.values()))
prompts = [f"You can see {subject} in the city of" for subject in subjects]
sweep = knock_out_attention(model, prompts, -1, subjects, probability(cities), window=3)
plain = float(sweep.clean.mean())
blocked = (sweep.effect + sweep.clean).mean("prompt").rename("P(answer)")
print(f"P(answer) {plain:.2f}; where the last token must not see the subject, by layer:")
print("  " + " ".join(f"{value:.2f}" for value in blocked.values))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
left.imshow(pattern.numpy(), cmap="Blues")
left.set_title("head 1.0 on tokens said twice")
left.set_xlabel("looks at token")
left.set_ylabel("token")
line_plot(blocked, title="the last token must not see the subject", ax=right, level=plain)
right.set_ylim(0, 1.05)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert (layer, head) == (1, 0) and best > 0.9 and second < 0.2, "there is one induction head"
assert blocked.min() == blocked[3:6].min() < 0.5, "the fact goes to the last token in the middle layers"
assert blocked[:2].min() > plain - 0.05, "and not before"
