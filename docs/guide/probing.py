"""Probing: from which layer on can a linear map read the continent of a country?"""

import os
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace.methods import collect_activations

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
continents = next(relation.pairs for relation in RELATIONS if relation.name == "country_continent")
countries = list(continents)
random.Random(0).shuffle(countries)
kinds = sorted(set(continents.values()))
labels = torch.tensor([kinds.index(continents[country]) for country in countries])

# the residual at the country's last token, in a sentence that does not ask for the continent
prompts = [f"The capital of {country}" for country in countries]
with tempfile.TemporaryDirectory() as folder:
    found = collect_activations(model, prompts, to=folder, of=["resid_pre", "resid_post"], positions=-1)
    names = ["resid_pre.0", *(f"resid_post.{number}" for number in range(len(model.layers)))]
    residuals = [found.array(name) for name in names]


def accuracy(features, labels):
    """Of ridge regression onto the classes, on the fifth of the countries that it was not fitted on, five times."""
    targets = torch.nn.functional.one_hot(labels).float()
    fold, right = torch.arange(len(labels)) % 5, 0
    for number in range(5):
        fitted, held_out = features[fold != number], features[fold == number]
        mean, level = fitted.mean(0), targets[fold != number].mean(0)
        centred = (fitted - mean) / fitted.std()
        kernel = centred @ centred.T + 0.1 * centred.shape[1] * torch.eye(len(centred))
        weights = centred.T @ torch.linalg.solve(kernel, targets[fold != number] - level)
        guesses = ((held_out - mean) / fitted.std() @ weights + level).argmax(-1)
        right += (guesses == labels[fold == number]).sum().item()
    return right / len(labels)


shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
read = [accuracy(residual, labels) for residual in residuals]
control = [accuracy(residual, shuffled) for residual in residuals]
commonest = labels.bincount().max().item() / len(labels)
print("              embedding  layers 0 to 7")
print("continent    ", " ".join(f"{value:.2f}" for value in read))
print("random labels", " ".join(f"{value:.2f}" for value in control))

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
axes.plot(read, marker="o", label="continent")
axes.plot(control, marker="o", label="random labels")
axes.axhline(commonest, linestyle=":", color="gray", label="always the commonest")
axes.set_xticks(range(len(read)), ["embedding", *range(len(read) - 1)])
axes.set_xlabel("layer")
axes.set_ylabel("accuracy, held out")
axes.set_ylim(0, 1)
axes.legend(loc=(0.55, 0.5))
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert max(read[3:]) > read[0] + 0.1, "the layers add to what the name's embedding has"
assert min(read[3:]) > 0.85 and max(control) < 0.45, "and it is the continent that is there, not anything"
