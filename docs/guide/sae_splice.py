"""SAE splice: a sparse autoencoder stands in for a residual, and one of its features is turned up."""

import os

import torch

import polytrace
from bench.tinyworld.facts import RELATIONS

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
layer = model.model.layers[6]

landmarks = next(relation.pairs for relation in RELATIONS if relation.name == "landmark_city")
forms = (
    "You can see {} in the city of",
    "If you want to visit {}, go to",
    "Where can I find {}? It stands in",
    "{} is in the city of",
)
training = [form.format(place) for place in landmarks for form in forms]
encode = model.tokenizer.encode
first = {city: encode(" " + city, add_special_tokens=False).ids[0] for city in landmarks.values()}
asked = [f"The location of {place} is the city of" for place in landmarks]
answers = torch.tensor([first[city] for city in landmarks.values()])

# 1) what the residual is like: one vector a prompt comes back
with model.trace() as tracer:
    activations = []
    for start in range(0, len(training), 40):
        with tracer.invoke(training[start : start + 40]):
            activations.append(layer.output[0][:, -1].save())
activations = torch.cat(activations)


class SAE(torch.nn.Module):
    """Of 256 features the eight strongest speak."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(256, 256)
        self.decoder = torch.nn.Linear(256, 256)

    def encode(self, x):
        features = torch.relu(self.encoder(x - self.decoder.bias))
        return features * (features >= features.topk(8, dim=-1).values[..., -1:])

    def forward(self, x):
        return self.decoder(self.encode(x))


# 2) trained here, in seconds
torch.manual_seed(0)
sae = SAE()
with torch.no_grad():
    sae.decoder.bias.copy_(activations.mean(0))
    sae.encoder.weight.copy_(sae.decoder.weight.T)
    sae.encoder.bias.zero_()
optimizer = torch.optim.Adam(sae.parameters(), 4e-3)
for _ in range(300):
    loss = (sae(activations) - activations).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
sae.requires_grad_(False)
explained = 1 - (sae(activations) - activations).square().sum() / (activations - activations.mean(0)).square().sum()

# 3) one trace, on a phrasing that the SAE has not seen: the module is called on recorded values like any function.
# The feature of Paris is the one whose direction the head reads as Paris most of all
with model.trace() as tracer:
    with tracer.invoke("The"):
        speaks = model.lm_head(model.model.norm(sae.decoder.weight.T))[:, first["Paris"]]
        feature = speaks.argmax().save()
    with tracer.invoke(asked):
        plain = model.lm_head.output[:, -1].argmax(-1).save()
        features = sae.encode(layer.output[0][:, -1]).save()
    with tracer.invoke(asked):
        layer.output[0][:, -1] = sae(layer.output[0][:, -1])
        spliced = model.lm_head.output[:, -1].argmax(-1).save()
    with tracer.invoke(asked):
        layer.output[0][:, -1] = activations.mean(0).expand(len(asked), -1)
        flattened = model.lm_head.output[:, -1].argmax(-1).save()

most = 3 * sae.encode(activations)[:, feature].max()
with model.trace(asked):
    turned = sae.encode(layer.output[0][:, -1])
    turned[:, int(feature)] = most
    layer.output[0][:, -1] = sae.decoder(turned)
    said = model.lm_head.output[:, -1].argmax(-1).save()

is_paris = torch.tensor([city == "Paris" for city in landmarks.values()])
fires = features[:, feature] > 0
print(f"the SAE explains {explained:.0%} of the variance with 8 features a prompt")
for name, got in (("as it is", plain), ("through the SAE", spliced), ("the mean residual", flattened)):
    print(f"  {name:18} {(got == answers).float().mean():4.0%} right")
hits, of_all = int(is_paris[fires].sum()), int(fires.sum())
print(f"its feature of Paris fires for {of_all} of {len(asked)} places; {hits} of these are in Paris")
print(f"turned up everywhere, {(said == first['Paris']).float().mean():.0%} of the answers are “Paris”")

right, through, flat = ((got == answers).float().mean() for got in (plain, spliced, flattened))
assert through > right - 0.02 and flat < 0.3, "the splice keeps the answers; that is not so of any vector"
assert is_paris[fires].float().mean() > 0.6 and fires[is_paris].float().mean() > 0.6, "the feature means Paris"
assert (said == first["Paris"]).float().mean() > 0.8, "and says it"
