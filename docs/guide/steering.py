"""Steering with a gate: a direction that is added only where the model is asked about landmarks."""

import os
import random

import torch

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import contrastive_vectors, steer

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

pairs = {relation.name: relation.pairs for relation in RELATIONS}
places = [place for place, city in pairs["landmark_city"].items() if city != "Rome"]
roman = [f"You can see {place} in the city of" for place, city in pairs["landmark_city"].items() if city == "Rome"]
countries = [country for country, capital in pairs["country_capital"].items() if capital != "Rome"]
random.Random(0).shuffle(places)
random.Random(0).shuffle(countries)
landmarks = [f"You can see {place} in the city of" for place in places]
capitals = [f"The capital city of {country} is" for country in countries]

# 1) the direction to Rome, and the gate: what tells questions about landmarks from those about capitals
direction = contrastive_vectors(model, roman, landmarks[:20], layers=5)
gate = contrastive_vectors(model, landmarks[:20], capitals[:20], layers=2).gate(2, position=-1)

# 2) prompts that were not measured: as they are, steered always, and steered where the gate is open
said, logits = {}, {}
for name, prompts in (("landmarks", landmarks[20:]), ("capitals", capitals[20:])):
    swept = steer(model, prompts, direction, positions=-1, factor=[0.0, 3.0], tokens=[" Rome"])
    gated = steer(model, prompts, direction, positions=-1, factor=3.0, gate=gate, tokens=[" Rome"])
    for how, found, factor in (("not at all", swept, 0.0), ("always", swept, 3.0), ("with the gate", gated, 3.0)):
        said[name, how] = float((found.rank.sel(factor=factor) == 0).mean())
        logits[name, how] = torch.tensor(found.logit.sel(factor=factor).values[:, 0])

print("answers “Rome”, steered      landmarks   capitals")
for how in ("not at all", "always", "with the gate"):
    print(f"  {how:26} {said['landmarks', how]:8.0%} {said['capitals', how]:10.0%}")
same = torch.equal(logits["capitals", "with the gate"], logits["capitals", "not at all"])
print(f"behind a closed gate the logits are {'the same, bit for bit' if same else 'others'}")

# 3) the same by hand
rome = model.tokenizer.encode(" Rome", add_special_tokens=False).ids[0]
with model.trace(landmarks[20:]):
    is_open = model.layers[2].resid_post[:, -1] @ gate.direction > gate.threshold
    model.layers[5].resid_post[:, -1] += 3 * torch.where(is_open[:, None], direction[5], 0.0)
    by_hand = model.lm_head.output[:, -1, rome].save()

assert said["landmarks", "not at all"] == said["capitals", "not at all"] == 0
assert said["capitals", "always"] > 0.9, "without a gate the direction changes every answer"
assert said["landmarks", "with the gate"] > 0.9 and said["capitals", "with the gate"] == 0
assert same
assert (by_hand - logits["landmarks", "with the gate"]).abs().max() < 1e-4
