"""Patchscopes: a hidden state is put into another prompt, and the model itself says what is in it."""

import os
from pathlib import Path

import matplotlib.pyplot as plt

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace import methods

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

encode = model.tokenizer.encode
landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
answers = {place: encode(" " + city, add_special_tokens=False).ids for place, city in landmarks.items()}
places = [place for place, ids in answers.items() if len(ids) == 1][:60]
sources = [f"I read in a book that {place}" for place in places]
asks = encode("You can see Bob in the city of")

# a landmark's last token, in a sentence that asks nothing, is put in Bob's place at the same layer
target = methods.Target(prompt=asks.ids, position=asks.tokens.index("ĠBob"))
said = methods.patchscope(model, sources, target, top_k=1)
seen = methods.logit_lens(model, sources, top_k=1)

scope, lens = [], []
for shares, ids in ((scope, said.token_id), (lens, seen.token_id)):
    right = ids.isel(position=0, rank=0).values == [answers[place] for place in places]  # landmark x layer
    shares.extend(right.mean(0).tolist())
print(f"the city of {len(places)} landmarks, read from one state by layer")
print("  patchscope", " ".join(f"{value:.2f}" for value in scope))
print("  logit lens", " ".join(f"{value:.2f}" for value in lens))
receipt = said.receipts[0]
print(f"{receipt.token_layers:,} rows of a layer instead of {receipt.token_layers_alone:,}")

told = methods.patchscope(model, sources[:1], target, layers=[1], generate=3)
print(f"of {places[0]} it says {told.text.values[0, 0, 0]!r}")

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
axes.plot(scope, marker="o", label="patchscope")
axes.plot(lens, marker="o", label="logit lens")
axes.set_xlabel("layer")
axes.set_ylabel("prompts with the right city (share)")
axes.set_ylim(-0.02, 1)
axes.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert max(scope) > 0.6 and max(lens) < 0.05, "the city is in the state, in a form that only later layers can read"
assert scope.index(max(scope)) in (1, 2, 3) and scope[-1] < 0.05, "from where later layers still read it"
