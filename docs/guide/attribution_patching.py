"""Attribution patching: what would every patch do, by one gradient instead of a run for each?"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import polytrace
from polytrace.methods import (
    attribution_patching,
    edge_attribution_patching,
    heat_map,
    logit_difference,
    patch_activations,
    patch_heads,
    top_k_table,
)

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")
clean, right = "The Eiffel Tower is in the city of", " Paris"
corrupt, wrong = "The Galata Tower is in the city of", " Istanbul"
lead = logit_difference(right, wrong)

# 1) all heads: two forwards and one backward, beside a run for each
estimated = attribution_patching(model, clean, corrupt, lead, of="z")
true = patch_heads(model, clean, corrupt, lead, of="z")


def spearman(one, other):
    """The correlation of ranks."""
    ranks = [np.argsort(np.argsort(values, axis=None)) for values in (one.values, other.values)]
    return float(np.corrcoef(ranks)[0, 1])


agreement = spearman(estimated.effect, true.effect)
rows = estimated.receipt.token_layers, true.receipt.token_layers
print(f"{true.effect.size} heads: ranks agree to {agreement:.3f}, with {rows[0]} rows of a layer instead of {rows[1]}")

# 2) whole residuals: a straight line is a good guess where what is behind is short
straight = attribution_patching(model, clean, corrupt, lead, of="resid_pre").effect
bent = patch_activations(model, clean, corrupt, lead, of="resid_pre").effect
name = straight.position_token.values.tolist().index(" Eiffel")
for where, place in (("the name", name), ("the last token", -1)):
    for kind, shares in (("estimated", straight), ("patched", bent)):
        print(f"{where:14} {kind:9}", " ".join(f"{share:5.2f}" for share in shares[:, place].values), " by layer")

# 3) edges: who tells whom
change = edge_attribution_patching(model, clean, corrupt, lead).effect
count = int(np.isfinite(change.values).sum())
print(f"{count:,} edges; the lead changes most where one of these says what the corrupt run says:")
for _, row in top_k_table(change, 6, smallest=True).iterrows():
    print(f"  {row['writer']:>9} -> {row['reader']:7} {row[change.name]:6.2f}")

figure, (left, middle, last) = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
heat_map(estimated.effect, ax=left, title="estimated: one gradient", limits=(-0.15, 0.15))
heat_map(true.effect, ax=middle, title="patched: a run for each head", limits=(-0.15, 0.15))
last.scatter(true.effect.values, estimated.effect.values, s=18)
last.axline((0, 0), slope=1, color="grey", linewidth=0.8)
last.set_title(f"each head: rank correlation {agreement:.3f}")
last.set_xlabel("patched")
last.set_ylabel("estimated")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

assert agreement > 0.98, "heads are ranked as by patching them"
assert rows[0] < rows[1] / 5, "a way back counts as two forwards"
assert bent[0, name] > 2 * straight[0, name], "early residuals are estimated badly: too much is behind them"
