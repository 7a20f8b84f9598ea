"""Sites of mixtures of experts, whose rows have no sequences in the model: routers, and what experts take and give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, model_of
from programs import difference, find

from engine.local import LocalBackend
from polytrace.model import Model

TOLERANCE = 1e-5  # of max(1, max|plain|), float32
PROMPTS = [[7, 3, 5, 9, 11, 2, 4], [7, 3, 5, 1]]
ROUTERS = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router"}
LAYER = 2


@pytest.fixture(scope="module", params=sorted(ROUTERS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    plain = model_of(request.param)
    plain.save_pretrained(folder)
    return request.param, plain, Model(LocalBackend(str(folder), threads=1))


def _by_hand(plain: Any, family: str, prompt: list[int], *, damped: bool) -> dict[str, torch.Tensor]:
    """The router's output, the experts' and the logits of the plain model; the last token's experts damped."""
    seen: dict[str, torch.Tensor] = {}
    layer = find(plain, f"{FAMILIES[family].layers}.{LAYER}")

    def router(_module: Any, _args: Any, output: Any) -> Any:
        logits, weights, *rest = output
        if damped:
            weights = weights.clone()
            weights[-1] *= 0.25
        seen["router"], seen["weights"] = logits.clone(), weights.clone()
        return (logits, weights, *rest)

    def experts(_module: Any, _args: Any, output: torch.Tensor) -> None:
        seen["experts"] = output.clone()

    handles = [
        find(layer, ROUTERS[family]).register_forward_hook(router),
        layer.mlp.experts.register_forward_hook(experts),
    ]
    with torch.no_grad():
        seen["logits"] = plain(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("damped", [False, True])
def test_what_routers_and_experts_do_is_read_and_edited(served: Any, damped: bool) -> None:
    family, plain, model = served

    def ask(prompts: list[list[int]], **options: Any) -> dict[str, torch.Tensor]:
        with model.trace(prompts, **options):
            layer = model.model.layers[LAYER]
            router = find(layer, ROUTERS[family])
            if damped:
                router.output[1][:, -1] *= 0.25
            return {
                "router": router.output[0].save(),
                "weights": router.output[1].save(),
                "experts": layer.mlp.experts.output.save(),
                "logits": model.lm_head.output.save(),
            }

    together = ask(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        alone, expected = ask([prompt], sharing="off"), _by_hand(plain, family, prompt, damped=damped)
        for name, value in together.items():
            own = value[number, -len(prompt) :]
            assert torch.equal(own, alone[name][0]), name
            assert difference([own], [expected[name]]) <= TOLERANCE, name
        if damped:
            untouched = _by_hand(plain, family, prompt, damped=False)
            assert difference([together["logits"][number, -1:]], [untouched["logits"][-1:]]) > 10 * TOLERANCE
