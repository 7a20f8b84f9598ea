"""Causal tracing: the subject is blurred by noise; which single state brings the fact back?"""

import os
from pathlib import Path

import polytrace
from polytrace.methods import heat_map, probability, trace_causes

url = os.environ.get("POLYTRACE_URL")
model = polytrace.connect(url) if url else polytrace.load("bench/tinyworld/model")

# of each layer and token: its residual, or what MLPs or attention say in three layers around
sweep = trace_causes(
    model,
    "The Eiffel Tower is in the city of",
    "Eiffel Tower",  # is blurred, eight times over
    probability(" Paris"),
    window=3,
    samples=8,
)

tokens = sweep.effect.position_token.values.tolist()
end, last = tokens.index(" Tower"), len(tokens) - 1
print(
    f"P(Paris): {float(sweep.clean):.2f} clean, {float(sweep.corrupt):.2f} with the subject blurred; restored by layer:"
)
for name, grid in zip(("residual", "mlp", "attention"), sweep.effect, strict=True):
    for where, column in ((f"{name:9} at the subject's end", end), (f"{'':9} at the last token   ", last)):
        print(f"  {where}", " ".join(f"{value:.2f}" for value in grid.sel(position=column).values))

figure = heat_map(sweep.effect, limits=(0, 1), colours="Purples", label="P(Paris)")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)

residual, mlp, attention = (sweep.effect.sel(restored=name) for name in ("resid_post", "mlp", "attention"))
assert sweep.clean > 0.9 and sweep.corrupt < 0.2
assert residual[1, end] > 0.7 and residual[-2, last] > 0.8, "an early site and a late one"
assert mlp[:3, end].min() > 0.6 > 0.5 > mlp[3:, end].max(), "early MLPs at the subject's end"
assert attention[3:6, last].min() > 0.8, "attention in the middle takes it to the last token"
