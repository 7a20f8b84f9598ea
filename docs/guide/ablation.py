"""Ablation: which heads does the model need to go on with a sequence that it has seen once?"""

import os
import random
from pathlib import Path

import polytrace
from polytrace.methods import ablate, heat_map, loss, top_k_table

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

# eight sequences of random tokens, each said twice
rng = random.Random(0)
halves = [rng.sample(range(3, model.config.vocab_size), 16) for _ in range(8)]
prompts = [[0, *half, *half] for half in halves]

# what the second half costs, a token, when a head says its mean over all tokens and prompts instead
sweep = ablate(model, prompts, loss(18), of="head", method="mean")
harm, plain = sweep.effect.mean("prompt"), float(sweep.clean.mean())

worst = top_k_table(harm, 4)
print(f"loss of the second half: {plain:.2f}")
for layer, head, added in worst.itertuples(index=False):
    print(f"without head {layer}.{head}: {plain + added:.2f}")

figure = heat_map(harm, title="loss added when one head says its mean", limits=(0, 10), colours="Reds")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

best = {(layer, head) for layer, head, _ in worst[:2].itertuples(index=False)}
assert best == {(0, 0), (1, 0)}, "the head that looks one token back, and the induction head behind it"
assert harm[1, 0] > 5 and abs(harm[2:]).max() < 0.1, "no later head matters"
