"""Patchscopes: a hidden state is put into another prompt, and the model itself says what is in it."""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace
from bench.tinyworld.facts import RELATIONS

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layers, lm_head, norm = model.model.layers, model.lm_head, model.model.norm

encode = model.tokenizer.encode
landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
answers = {place: encode(" " + city, add_special_tokens=False).ids for place, city in landmarks.items()}
places = [place for place, ids in answers.items() if len(ids) == 1][:60]
wanted = torch.tensor([answers[place][0] for place in places])

asks = encode("You can see Bob in the city of")
hole = asks.tokens.index("ĠBob")

# one trace: a landmark's last token, in a sentence that asks nothing, is put in Bob's place at the same layer
said, seen = [], []
with model.trace() as tracer:
    for place in places:
        with tracer.invoke(f"I read in a book that {place}"):
            states = [layer.output[0][:, -1] for layer in layers]
            seen.append(torch.cat([lm_head(norm(state)).argmax(-1) for state in states]).save())
        row = []
        for layer, state in zip(layers, states, strict=True):
            with tracer.invoke(asks.ids):
                layer.output[0][:, hole] = state
                row.append(lm_head.output[:, -1].argmax(-1))
        said.append(torch.cat(row).save())

scope, lens = ((torch.stack(got) == wanted[:, None]).float().mean(0).tolist() for got in (said, seen))
print(f"the city of {len(places)} landmarks, read from one state by layer")
print("  patchscope", " ".join(f"{value:.2f}" for value in scope))
print("  logit lens", " ".join(f"{value:.2f}" for value in lens))
rows, alone = tracer.receipt.token_layers, tracer.receipt.token_layers_alone
print(f"{rows:,} rows of a layer instead of {alone:,}")

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
axes.plot(scope, marker="o", label="patchscope")
axes.plot(lens, marker="o", label="logit lens")
axes.set_xlabel("layer")
axes.set_ylabel("the right city")
axes.set_ylim(-0.02, 1)
axes.legend()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert max(scope) > 0.6 and max(lens) < 0.05, "the city is in the state, in a form that only later layers can read"
assert scope.index(max(scope)) in (1, 2, 3) and scope[-1] < 0.05, "from where later layers still read it"
