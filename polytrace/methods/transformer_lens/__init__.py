"""TransformerLens's habits over any served model: `HookedModel(model).run_with_cache("The Eiffel Tower is in")`.

Its names and calls (Nanda and Bloom, 2022, https://github.com/TransformerLensOrg/TransformerLens), the model's own
numbers: nothing is folded into the weights and nothing is centred, as in its `from_pretrained_no_processing`.
"""

from polytrace.methods.transformer_lens.cache import ActivationCache
from polytrace.methods.transformer_lens.factored import FactoredMatrix
from polytrace.methods.transformer_lens.hooked import HookedModel
from polytrace.methods.transformer_lens.names import get_act_name

__all__ = ["ActivationCache", "FactoredMatrix", "HookedModel", "get_act_name"]
