"""Function vectors: a few heads carry the question; their sum, added elsewhere, asks it again."""

import os
import random
from pathlib import Path

import matplotlib.pyplot as plt
import xarray

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import Task, function_vector, steer

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

capitals, languages = (
    next(relation.pairs for relation in RELATIONS if relation.name == name)
    for name in ("country_capital", "country_language")
)
pieces = {capital: model.tokenizer.encode(" " + capital, add_special_tokens=False).ids for capital in capitals.values()}
countries = [country for country in capitals if country in languages and len(pieces[capitals[country]]) == 1]
random.Random(0).shuffle(countries)
measured, held_out = countries[:36], countries[36:]


def asking(some):
    return [f"The capital of {country} is the city of" for country in some]


def other(some):
    return [f"People in {country} speak" for country in some]


# 1) what each head says at the last token when capitals are asked for, put in where languages are: which ones matter?
task = Task(clean=asking(measured), corrupt=other(measured), answers=[" " + capitals[one] for one in measured])
found = function_vector(model, task, top_k=6, score="log_probability")

# 2) as a control, six other heads
width = found.effects.sizes["head"]
rest = [place for place in range(found.effects.size) if divmod(place, width) not in found.heads]
chosen = xarray.zeros_like(found.effects)
for place in random.Random(1).sample(rest, 6):
    chosen[divmod(place, width)] = 1.0
control = function_vector(model, task, top_k=6, effects=chosen)

# 3) countries that were not measured: the vector is added once, at the last token of one layer
expected = [" " + capitals[country] for country in held_out]


def share(vector, layer, factor=2.0):
    """Of the held-out countries: those whose capital is the answer."""
    told = steer(model, other(held_out), vector, layer, positions=-1, factor=factor, top_k=1)
    return float((told.token.squeeze().values == expected).mean())


shares = {
    name: [share(own.vector, layer) for layer in range(len(model.layers))]
    for name, own in (("function vector", found), ("six other heads", control))
}
unchanged = share(found.vector, 0, factor=0.0)
print(f"“{other(['France'])[0]}” is answered with the capital by {unchanged:.0%}")
print("heads that matter most:", ", ".join(f"{number}.{head}" for number, head in found.heads))
for name, row in shares.items():
    print(f"  with the {name:15} at layer", " ".join(f"{value:.2f}" for value in row))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
image = left.imshow(found.effects.values, vmin=-3, vmax=3, cmap="RdBu_r", origin="lower")
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

assert unchanged == 0
assert max(shares["function vector"]) > 0.9, "one vector asks another question, also of countries it was not made from"
assert max(shares["six other heads"]) < 0.1
