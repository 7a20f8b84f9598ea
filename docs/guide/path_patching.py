"""Path patching: does a head speak to the answer, or to other heads?"""

import os
from pathlib import Path

import xarray

import polytrace
from polytrace.methods import heat_map, logit_difference, patch_heads, patch_paths

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

# who receives? "Mary": the other one; in the corrupt prompts the other one gives
people = "Mary John, Tom Anna, Paul Lucy, Laura Frank, Simon Karen, Nina Oscar, Emily Mark, Jack Susan"
pairs = [pair.split() for pair in people.split(", ")]
clean = [f"When {a} and {b} went to the store, {b} gave a drink to" for a, b in pairs]
corrupt = [f"When {a} and {b} went to the store, {a} gave a drink to" for a, b in pairs]
lead = logit_difference([f" {a}" for a, _ in pairs], [f" {b}" for _, b in pairs])

# 1) each head of the last token as in the corrupt run: with all behind it free (total), and by its direct path alone
swapped = patch_heads(model, clean, corrupt, lead, positions=-1, direction="noise", normalise=False)
total = (swapped.effect - swapped.clean).mean("prompt")
direct = patch_paths(model, clean, corrupt, lead, positions=-1, mlps="frozen").effect.mean("prompt")

# 2) the two heads that matter most without speaking to the answer: along which path do they matter?
senders = [divmod(place, total.sizes["head"]) for place in (direct - total).values.argsort(axis=None)[:-3:-1].tolist()]
change = {}
for receivers in ("logits", "q", "k", "v"):
    sent = patch_paths(model, clean, corrupt, lead, senders=senders, receivers=receivers, positions=-1, mlps="frozen")
    change[receivers] = float(sent.effect.mean())

plain = float(sent.clean.mean())
print(f"the right name leads by {plain:.1f}")
for layer, head in senders:
    alone, path = float(total.sel(layer=layer, head=head)), float(direct.sel(layer=layer, head=head))
    print(f"head {layer}.{head} as in the corrupt run changes that by {alone:+.1f}, by its direct path by {path:+.1f}")
for receivers, path in (("logits", "the answer"), ("q", "later queries"), ("k", "later keys"), ("v", "later values")):
    print(f"what both say to {path} alone changes it by {change[receivers]:+.1f}")

both = xarray.concat([total, direct], dim=xarray.Variable("path", ["all that follows", "to the answer alone"]))
figure = heat_map(both, limits=(-4, 4), label="change of the lead")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert {number for number, _ in senders} == {2}
assert change["logits"] > -1 and all(total[place] < -1 for place in senders), "they do not speak to the answer"
assert change["q"] < -5 and abs(change["v"]) < 0.1, "they tell later heads where to look"
