"""Learning on the service: a vector that changes an answer, and the one direction that holds a variable."""

import os
import random
from pathlib import Path

import matplotlib.pyplot as plt

import polytrace
from bench.tinyworld.corpus import NAMES
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import interchange, learn_rotation, learn_steering_vector, logit_difference, steer

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
rng = random.Random(0)
cities = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
prompts = [f"You can see {place} in the city of" for place, city in cities.items() if city != "Rome"]
rng.shuffle(prompts)

# 1) a vector that moves landmarks to Rome, learnt from eight of them: 25 steps, one request
learnt = learn_steering_vector(model, prompts[:8], " Rome", layer=3, steps=25, lr=0.4)
told = steer(model, prompts[8:48], learnt.vectors, factor=[0.0, 1.0], tokens=[" Rome"])
before, after = (told.rank == 0).mean(["prompt", "token"]).values
print(f"surprise at “Rome”: {float(learnt.losses[0]):.1f} nats, and {float(learnt.losses[-1]):.2f} when it is learnt")
print(f"40 other landmarks are in Rome: {before:.0%} without the vector, {after:.0%} with it")


def sentences(count):
    """The second one gives; others, of whom the first one gives; who would receive if it were so, and who does."""
    for _ in range(count):
        one, two, three, four = rng.sample(NAMES, 4)
        yield (
            f"When {one} and {two} went to the store, {two} gave a drink to",
            f"When {three} and {four} went to the store, {three} gave a drink to",
            f" {two}",
            f" {one}",
        )


# 2) where the giver is named again: which direction says that it was the first one, or the second?
bases, sources, swapped, _ = (list(part) for part in zip(*sentences(8), strict=True))
others, givers, others_swapped, receivers = (list(part) for part in zip(*sentences(30), strict=True))
lead = logit_difference(others_swapped, receivers)
rotations, shares = {}, {}
for layer in (0, 1, 2):
    rotations[layer] = learn_rotation(
        model, bases, sources, swapped, layer=layer, positions=10, size=1, steps=15, lr=0.05
    )
    sweep = interchange(model, others, givers, lead, rotation=rotations[layer])
    shares[layer] = float((sweep.effect > 0).mean())
    print(f"one direction behind layer {layer} turns {shares[layer]:4.0%} of 30 new sentences round")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(learnt.losses.values, color="black")
left.set_title("a vector for “Rome”, at layer 3")
right.set_title("one direction for who gives")
for layer, rotation in rotations.items():
    right.plot(rotation.losses.values, label=f"layer {layer}: {shares[layer]:.0%}")
right.legend(title="new ones turned", loc="center right")
for axes in (left, right):
    axes.set_xlabel("step")
    axes.set_ylabel("loss in nats")
    axes.set_ylim(bottom=0)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert before == 0 and after > 0.8, "what was learnt from eight landmarks holds for others"
assert shares[1] > 0.9 and shares[0] == shares[2] == 0, "it is there behind layer 1, and nowhere else at this token"
assert len(learnt.receipt.passes) == 51, "26 forwards and 25 backwards"
