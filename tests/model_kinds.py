"""Tiny models of many kinds with seeded weights: the model, a module inside of it, and two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Kind = tuple[nn.Module, str, dict[str, Any], dict[str, Any]]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Its weights are large enough that edits show."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def ids(*shape: int, top: int = 60) -> Tensor:
    return torch.randint(3, top, shape)


class Looped(nn.Module):
    """A module that runs several times in one forward, and returns several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = torch.relu(self.first(x))
        for _ in range(3):
            hidden = torch.tanh(self.shared(hidden))
        return {"y": self.last(hidden) * scale, "hidden": (hidden, hidden.sum())}


def looped() -> Kind:
    model = seeded(Looped)
    return model, "shared", {"x": torch.randn(3, 4)}, {"x": torch.randn(3, 4), "scale": 2.0}


def bert() -> Kind:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = seeded(lambda: transformers.BertModel(config))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    call = {"input_ids": ids(2, 5), "attention_mask": mask}
    return model, "encoder.layer.0", call, {"input_ids": ids(2, 5), "attention_mask": mask}


def vit() -> Kind:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    model = seeded(lambda: transformers.ViTForImageClassification(config))
    return model, "vit.layers.0", {"pixel_values": images(2, 8)}, {"pixel_values": images(2, 8)}


def clip() -> Kind:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    model = seeded(lambda: transformers.CLIPModel(config))
    call = {"input_ids": ids(3, 5), "pixel_values": images(2, 8)}
    return model, "vision_model.encoder.layers.0", call, {**call, "pixel_values": images(2, 8)}


def whisper() -> Kind:
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = seeded(lambda: transformers.WhisperForConditionalGeneration(config))
    call = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 4)}
    return model, "model.encoder.layers.0", call, {**call, "input_features": torch.randn(2, 8, 40)}


def mamba() -> Kind:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=4
    )
    model = seeded(lambda: transformers.MambaForCausalLM(config))
    return model, "backbone.layers.0", {"input_ids": ids(2, 6)}, {"input_ids": ids(2, 6)}


def mamba2() -> Kind:
    config = transformers.Mamba2Config(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=4,
        expand=2,
    )
    model = seeded(lambda: transformers.Mamba2ForCausalLM(config))
    return model, "backbone.layers.0", {"input_ids": ids(2, 6)}, {"input_ids": ids(2, 6)}


def jamba() -> Kind:
    config = transformers.JambaConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        mamba_d_state=4,
        mamba_dt_rank=4,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
        pad_token_id=0,
    )
    model = seeded(lambda: transformers.JambaForCausalLM(config))
    call, other = {"input_ids": ids(2, 6), "use_cache": False}, {"input_ids": ids(2, 6), "use_cache": False}
    return model, "model.layers.0", call, other


def t5() -> Kind:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = seeded(lambda: transformers.T5ForConditionalGeneration(config))
    call = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 3)}
    return model, "decoder.block.0", call, {**call, "input_ids": ids(2, 6)}


def bart() -> Kind:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
    )
    model = seeded(lambda: transformers.BartForConditionalGeneration(config))
    call = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 3)}
    return model, "model.encoder.layers.0", call, {**call, "input_ids": ids(2, 6)}


def llava() -> Kind:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16),
        text_config=transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=64),
        image_token_index=63,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = seeded(lambda: transformers.LlavaForConditionalGeneration(config))
    tokens = torch.cat([ids(1, 2), torch.full((1, 4), 63), ids(1, 3)], 1)
    call = {"input_ids": tokens, "pixel_values": images(1, 8), "attention_mask": torch.ones_like(tokens)}
    return model, "model.vision_tower.encoder.layers.0", call, {**call, "pixel_values": images(1, 8)}


def qwen2_vl() -> Kind:
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
        image_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    model = seeded(lambda: transformers.Qwen2VLForConditionalGeneration(config))
    tokens = torch.cat([ids(1, 2), torch.tensor([[62, 61, 61, 61, 61, 63]]), ids(1, 3)], 1)
    call = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == 61).int(),
    }
    return model, "model.visual.blocks.0", call, {**call, "pixel_values": torch.randn(16, 3 * 2 * 4 * 4)}


def unet() -> Kind:
    """A U-Net that takes noise away: one call is one step. Needs diffusers."""
    import diffusers

    model = seeded(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    return model, "mid_block", {"sample": images(2, 8), "timestep": 7}, {"sample": images(2, 8), "timestep": 7}


def dit() -> Kind:
    """A transformer that takes noise away. Needs diffusers."""
    import diffusers

    model = seeded(
        lambda: diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=3,
            num_layers=2,
            norm_num_groups=4,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
    )
    more = {"timestep": torch.tensor([7, 7]), "class_labels": torch.tensor([1, 2])}
    call = {"hidden_states": images(2, 8), **more}
    return model, "transformer_blocks.0", call, {"hidden_states": images(2, 8), **more}


def images(number: int, size: int) -> Tensor:
    return torch.randn(number, 3, size, size)


KINDS: dict[str, Callable[[], Kind]] = {
    "module": looped,
    "bert": bert,
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
    "mamba": mamba,
    "mamba2": mamba2,
    "jamba": jamba,
    "t5": t5,
    "bart": bart,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
}
DIFFUSION: dict[str, Callable[[], Kind]] = {"unet": unet, "dit": dit}  # where diffusers is installed
