"""Steering with a gate: a direction that is added only where the model is asked about landmarks."""

import os
import random

import torch

import polytrace
from bench.tinyworld.facts import RELATIONS

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
looked_at, steered = model.model.layers[2], model.model.layers[5]

pairs = {relation.name: relation.pairs for relation in RELATIONS}
places = [place for place, city in pairs["landmark_city"].items() if city != "Rome"]
roman = [place for place, city in pairs["landmark_city"].items() if city == "Rome"]
countries = [country for country, capital in pairs["country_capital"].items() if capital != "Rome"]
random.Random(0).shuffle(places)
random.Random(0).shuffle(countries)
landmarks = [f"You can see {place} in the city of" for place in places]
capitals = [f"The capital city of {country} is" for country in countries]

# 1) the direction to Rome, and the gate: what tells questions about landmarks from those about capitals
with model.trace() as tracer:
    with tracer.invoke(landmarks[:20]):
        about_landmarks, elsewhere = looked_at.output[0][:, -1].mean(0), steered.output[0][:, -1].mean(0)
    with tracer.invoke(capitals[:20]):
        about_capitals = looked_at.output[0][:, -1].mean(0)
    with tracer.invoke([f"You can see {place} in the city of" for place in roman]):
        direction = (steered.output[0][:, -1].mean(0) - elsewhere).save()
    gate = (about_landmarks - about_capitals).save()
    threshold = ((about_landmarks + about_capitals) / 2 @ gate).save()

# 2) prompts that were not measured: as they are, steered always, and steered where the gate is open
answers = {}
with model.trace() as tracer:
    for name, prompts in (("landmarks", landmarks[20:]), ("capitals", capitals[20:])):
        with tracer.invoke(prompts):
            answers[name, "not at all"] = model.lm_head.output[:, -1].save()
        with tracer.invoke(prompts):
            steered.output[0][:, -1] += 3 * direction
            answers[name, "always"] = model.lm_head.output[:, -1].save()
        with tracer.invoke(prompts):
            is_open = looked_at.output[0][:, -1] @ gate > threshold
            steered.output[0][:, -1] += 3 * torch.where(is_open[:, None], direction, 0.0)
            answers[name, "with the gate"] = model.lm_head.output[:, -1].save()

rome = model.tokenizer.encode(" Rome", add_special_tokens=False).ids[0]
said = {key: (logits.argmax(-1) == rome).float().mean().item() for key, logits in answers.items()}
print("answers “Rome”, steered      landmarks   capitals")
for how in ("not at all", "always", "with the gate"):
    print(f"  {how:26} {said['landmarks', how]:8.0%} {said['capitals', how]:10.0%}")
same = torch.equal(answers["capitals", "with the gate"], answers["capitals", "not at all"])
print(f"behind a closed gate the logits are {'the same, bit for bit' if same else 'others'}")

assert said["landmarks", "not at all"] == said["capitals", "not at all"] == 0
assert said["capitals", "always"] > 0.9, "without a gate the direction changes every answer"
assert said["landmarks", "with the gate"] > 0.9 and said["capitals", "with the gate"] == 0
assert same
