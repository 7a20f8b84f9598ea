"""Eight experiments that researchers do, each asked of polytrace and done again by hand with plain Hugging Face.

An experiment is a pair: `ask` writes traces against a `polytrace` model, `check` gets the same values from
`bench.plain.Plain` with hooks. Both return named tensors that must be equal. Written for Llama-shaped models
(`model.layers`, `self_attn.o_proj`, `mlp.down_proj`); `turn` picks the prompts.
"""

from __future__ import annotations

from bench.experiments import ablation, attribution, induction, logit_lens, neuron, patching, probing, steering
from bench.experiments.experiment import Answer, Experiment, Values

__all__ = ["EXPERIMENTS", "Answer", "Experiment", "Values"]

EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(name="logit lens", ask=logit_lens.ask, check=logit_lens.check, tell=logit_lens.tell),
    Experiment(name="patching", ask=patching.ask, check=patching.check, tell=patching.tell),
    Experiment(name="steering", ask=steering.ask, check=steering.check, tell=steering.tell),
    Experiment(name="head ablation", ask=ablation.ask, check=ablation.check, tell=ablation.tell),
    Experiment(name="one neuron", ask=neuron.ask, check=neuron.check, tell=neuron.tell),
    Experiment(name="probing", ask=probing.ask, check=probing.check, tell=probing.tell),
    Experiment(name="induction heads", ask=induction.ask, check=induction.check, tell=induction.tell),
    Experiment(name="attribution", ask=attribution.ask, check=attribution.check, tell=attribution.tell),
)
