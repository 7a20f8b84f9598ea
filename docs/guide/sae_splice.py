"""SAE splice: a sparse autoencoder stands in for a residual, and one of its features is turned up."""

import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

import polytrace
from bench.tinyworld.facts import RELATIONS
from polytrace import methods

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
forms = (
    "You can see {} in the city of",
    "If you want to visit {}, go to",
    "Where can I find {}? It stands in",
    "{} is in the city of",
)
training = [form.format(place) for place in landmarks for form in forms]
asked = [f"The location of {place} is the city of" for place in landmarks]  # no phrasing that the SAE has seen
encode = model.tokenizer.encode
first = {city: encode(" " + city, add_special_tokens=False).ids[0] for city in landmarks.values()}
answers = torch.tensor([first[city] for city in landmarks.values()])

# 1) what the residual is like: one vector a prompt comes back
with tempfile.TemporaryDirectory() as folder:
    rows = methods.collect(model, training, to=folder, layers=6, positions=-1).array("resid_post.6")
mean = rows.mean(0)


def top_k(rows, W_enc, W_dec, b_enc, b_dec):
    """Of 256 features the eight strongest speak."""
    values = (rows - b_dec) @ W_enc + b_enc
    best = values.topk(8)
    return torch.zeros_like(values).scatter(-1, best.indices, best.values.relu()) @ W_dec + b_dec


# 2) trained here, in seconds
torch.manual_seed(0)
drawn = torch.empty(256, 256).uniform_(-1 / 16, 1 / 16)
weights = {"W_enc": drawn.T.clone(), "W_dec": drawn.clone(), "b_enc": torch.zeros(256), "b_dec": mean.clone()}
optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], 4e-3)
for _ in range(300):
    loss = (top_k(rows, **weights) - rows).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
sae = methods.SparseAutoencoder(
    **{name: weight.detach() for name, weight in weights.items()},
    architecture="topk",
    k=8,
    apply_b_dec_to_input=True,
    site=methods.LayerPoint("resid_post", 6),
)


def answered(edited):
    with edited.trace(asked):
        return edited.lm_head.output[:, -1].argmax(-1).save()


# 3) spliced in, and beside it a residual that says nothing of the place
spliced = methods.splice_sae(model, sae, positions=-1)
with model.edit() as flattened:
    model.layers[6].resid_post.at(-1)[:] = mean.expand(len(asked), -1)
runs = {"as it is": model, "through the SAE": spliced, "the mean residual": flattened}
said = {name: answered(edited) for name, edited in runs.items()}

# 4) what its features are about. A city's feature is the one that fires most for it in the phrasings that the SAE has
# seen, and least for other cities; then it is looked at in the one that it has not
cities = torch.tensor([first[city] for city in landmarks.values()])
known = sae.encode(rows) > 0
active = methods.sae_features(model, asked, sae, features=range(256), positions=-1).activation[:, 0]
fires = torch.tensor(active.values) > 0
large = [city for city, count in Counter(landmarks.values()).most_common() if count >= 3]
feature, found, meant = {}, [], []
for city in large:
    own = cities == first[city]
    among = own.repeat_interleave(len(forms))
    feature[city] = int((known[among].float().mean(0) - known[~among].float().mean(0)).argmax())
    found.append(fires[own, feature[city]].float().mean())
    meant.append(own[fires[:, feature[city]]].float().mean())
found, meant = torch.stack(found).mean(), torch.stack(meant).mean()

shown = active.sel(feature=[feature[city] for city in large[:12]]).assign_coords(prompt=list(landmarks.values()))
by_city = shown.groupby("prompt").mean().rename(prompt="city").sel(city=large[:12])
figure = methods.heat_map(by_city, rows="city", columns="feature", title="features by the city that is asked for")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, bbox_inches="tight")

# 5) the feature whose direction the head reads as Paris most of all, turned up everywhere
with model.trace("The"):
    speaks = model.lm_head(model.ln_final(sae.W_dec))[:, first["Paris"]].argmax().save()
value = 3 * float(sae.encode(rows)[:, int(speaks)].max())
said["turned up"] = answered(methods.steer_features(model, sae, int(speaks), value, error=False, positions=-1))

explained = 1 - (sae(rows) - rows).square().sum() / (rows - mean).square().sum()
print(f"the SAE explains {explained:.0%} of the variance with 8 features a prompt")
share = {name: (got == answers).float().mean() for name, got in said.items()}
for name in runs:
    print(f"  {name:18} {share[name]:4.0%} right")
print(f"a feature for each of {len(large)} cities:")
print(f"  it fires for {found:.0%} of the city's places, and {meant:.0%} of what it fires for is there")
everywhere = (said["turned up"] == first["Paris"]).float().mean()
print(f"what says Paris turned up everywhere, {everywhere:.0%} of the answers are “Paris”")

assert share["through the SAE"] > share["as it is"] - 0.02, "the splice keeps the answers"
assert share["the mean residual"] < 0.3, "that is not so of any vector"
assert found > 0.6 and meant > 0.6, "features mean cities"
assert everywhere > 0.8, "and say them"
