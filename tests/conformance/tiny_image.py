"""Tiny models of the image transformers of diffusers, and what their pipelines call them with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed, get_2d_rotary_pos_embed
from tiny import Tiny, randomise
from torch import nn

CHANNELS, SIZE, GRID = 4, 8, 4  # latents of 8×8 pixels; 4×4 patches of 2×2 pixels
WORDS, WIDTH = 6, 32  # of the text
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SQUARE = {"sample_size": SIZE, "patch_size": 2, "in_channels": CHANNELS}
ROPE = (4, 6, 6)

Inputs = dict[str, Any]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent(seed: int, batch: int) -> torch.Tensor:
    return noise(seed, batch, CHANNELS, SIZE, SIZE)


def packed(seed: int, batch: int) -> torch.Tensor:
    """A latent as the pipelines of the Flux family pack it: one token for each patch."""
    return noise(seed, batch, GRID * GRID, 4 * CHANNELS)


def text(batch: int) -> torch.Tensor:
    return noise(1000, batch, WORDS, WIDTH)


def pooled(batch: int) -> torch.Tensor:
    return noise(2000, batch, WIDTH)


def words(batch: int) -> torch.Tensor:
    return torch.ones(batch, WORDS, dtype=torch.bool)


def times(time: float, batch: int) -> torch.Tensor:
    return torch.full((batch,), time)


def positions(axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids of the packed patches and of the words."""
    image = torch.zeros(GRID, GRID, axes)
    image[..., 1] = torch.arange(GRID)[:, None]
    image[..., 2] = torch.arange(GRID)
    return image.flatten(0, 1), torch.zeros(WORDS, axes)


def sizes(batch: int) -> Inputs:
    """What the CogView pipelines say about the image."""
    size = torch.full((batch, 2), 8.0 * SIZE)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(batch, 2)}


def dit() -> nn.Module:
    model = diffusers.DiTTransformer2DModel(
        **HEADS, **SQUARE, out_channels=2 * CHANNELS, num_layers=3, num_embeds_ada_norm=10
    )
    return randomise(model)


def dit_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "timestep": (999 * times(time, batch)).long(),
        "class_labels": torch.arange(batch) % 10,
        "return_dict": False,
    }


def pixart() -> nn.Module:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS,
        **SQUARE,
        out_channels=2 * CHANNELS,
        num_layers=3,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
    )
    return randomise(model)


def pixart_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "timestep": (999 * times(time, batch)).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def sd3(**variant: Any) -> nn.Module:
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        **SQUARE,
        num_layers=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        out_channels=CHANNELS,
        pos_embed_max_size=SIZE,
        **variant,
    )
    return randomise(model)


def sd3_dual() -> nn.Module:
    return sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")


def sd3_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "encoder_hidden_states": text(batch),
        "pooled_projections": pooled(batch),
        "timestep": 1000 * times(time, batch),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def flux() -> nn.Module:
    model = diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )
    return randomise(model)


def flux_inputs(seed: int, time: float, batch: int) -> Inputs:
    img_ids, txt_ids = positions(3)
    return {
        "hidden_states": packed(seed, batch),
        "timestep": times(time, batch),
        "guidance": torch.full((batch,), 3.5),
        "pooled_projections": pooled(batch),
        "encoder_hidden_states": text(batch),
        "txt_ids": txt_ids,
        "img_ids": img_ids,
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def flux2() -> nn.Module:
    model = diffusers.Flux2Transformer2DModel(
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return randomise(model)


def flux2_inputs(seed: int, time: float, batch: int) -> Inputs:
    img_ids, txt_ids = positions(4)
    return {
        "hidden_states": packed(seed, batch),
        "timestep": times(time, batch),
        "guidance": torch.full((batch,), 4.0),
        "encoder_hidden_states": text(batch),
        "txt_ids": txt_ids.expand(batch, -1, -1),
        "img_ids": img_ids.expand(batch, -1, -1),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def chroma() -> nn.Module:
    model = diffusers.ChromaTransformer2DModel(
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=3,
        num_single_layers=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE,
        approximator_hidden_dim=32,
        approximator_layers=2,
    )
    return randomise(model)


def chroma_inputs(seed: int, time: float, batch: int) -> Inputs:
    img_ids, txt_ids = positions(3)
    return {
        "hidden_states": packed(seed, batch),
        "timestep": times(time, batch),
        "encoder_hidden_states": text(batch),
        "txt_ids": txt_ids,
        "img_ids": img_ids,
        "attention_mask": torch.ones(batch, WORDS + GRID * GRID, dtype=torch.bool),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def auraflow() -> nn.Module:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        **SQUARE,
        num_mmdit_layers=3,
        num_single_dit_layers=3,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        out_channels=CHANNELS,
        pos_embed_max_size=GRID * GRID,
    )
    return randomise(model)


def auraflow_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "encoder_hidden_states": text(batch),
        "timestep": times(time, batch),
        "return_dict": False,
        "attention_kwargs": None,
    }


def sana() -> nn.Module:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=WIDTH,
        sample_size=SIZE,
    )
    return randomise(model)


def sana_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "timestep": 1000 * times(time, batch),
        "return_dict": False,
        "attention_kwargs": None,
    }


def lumina2() -> nn.Module:
    model = diffusers.Lumina2Transformer2DModel(
        **SQUARE,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=32,
        axes_dim_rope=ROPE,
        axes_lens=(16, 8, 8),
        cap_feat_dim=WIDTH,
    )
    return randomise(model)


def lumina2_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "timestep": times(1 - time, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "return_dict": False,
        "attention_kwargs": None,
    }


def hunyuan_dit() -> nn.Module:
    model = diffusers.HunyuanDiT2DModel(
        **HEADS,
        **SQUARE,
        hidden_size=32,
        num_layers=6,  # two long skip connections: 0 to 5 and 1 to 4
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        text_len=WORDS,
        text_len_t5=WORDS,
        use_style_cond_and_image_meta_size=False,
    )
    return randomise(model)


def hunyuan_dit_inputs(seed: int, time: float, batch: int) -> Inputs:
    corners, grid = ((0, 0), (GRID, GRID)), (GRID, GRID)
    return {
        "hidden_states": latent(seed, batch),
        "timestep": 1000 * times(time, batch),
        "encoder_hidden_states": text(batch),
        "text_embedding_mask": words(batch),
        "encoder_hidden_states_t5": text(batch),
        "text_embedding_mask_t5": words(batch),
        "image_rotary_emb": get_2d_rotary_pos_embed(16, corners, grid, output_type="pt"),
        "return_dict": False,
    }


def qwen() -> nn.Module:
    model = diffusers.QwenImageTransformer2DModel(
        **HEADS,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE,
    )
    return randomise(model)


def qwen_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": packed(seed, batch),
        "timestep": times(time, batch),
        "encoder_hidden_states_mask": words(batch),
        "encoder_hidden_states": text(batch),
        "img_shapes": [[(1, GRID, GRID)]] * batch,
        "attention_kwargs": None,
        "return_dict": False,
    }


def z_image() -> nn.Module:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=32,
        n_layers=3,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=list(ROPE),
        axes_lens=[64, 8, 8],
    )
    return randomise(model)


def z_image_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "x": list(latent(seed, batch).unsqueeze(2)),
        "t": times(1 - time, batch),
        "cap_feats": list(text(batch)),
        "return_dict": False,
    }


def cogview3() -> nn.Module:
    model = diffusers.CogView3PlusTransformer2DModel(
        **HEADS,
        **SQUARE,
        num_layers=3,
        out_channels=CHANNELS,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        pos_embed_max_size=SIZE,
    )
    return randomise(model)


def cogview4() -> nn.Module:
    model = diffusers.CogView4Transformer2DModel(
        **HEADS,
        **SQUARE,
        num_layers=3,
        out_channels=CHANNELS,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        condition_dim=8,
        rope_axes_dim=(SIZE, SIZE),
    )
    return randomise(model)


def cogview_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "encoder_hidden_states": text(batch),
        "timestep": 1000 * times(time, batch),
        **sizes(batch),
        "return_dict": False,
    }


def hidream() -> nn.Module:
    model = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(SIZE, SIZE),
        llama_layers=list(range(6)),
    )
    return randomise(model)


def hidream_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": latent(seed, batch),
        "timesteps": 1000 * times(time, batch),
        "encoder_hidden_states_t5": text(batch),
        "encoder_hidden_states_llama3": noise(3000, 6, batch, WORDS, WIDTH),
        "pooled_embeds": pooled(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def stable_audio() -> nn.Module:
    model = diffusers.StableAudioDiTModel(
        **HEADS,
        sample_size=16,
        in_channels=CHANNELS,
        num_layers=3,
        num_key_value_attention_heads=1,
        out_channels=CHANNELS,
        cross_attention_dim=32,
        time_proj_dim=32,
        global_states_input_dim=WIDTH,
        cross_attention_input_dim=WIDTH,
    )
    return randomise(model)


def stable_audio_inputs(seed: int, time: float, batch: int) -> Inputs:
    rotary = get_1d_rotary_pos_embed(8, 1 + 16, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": noise(seed, batch, CHANNELS, 16),
        "timestep": times(time, batch),
        "encoder_hidden_states": text(batch),
        "global_hidden_states": pooled(batch)[:, None],
        "rotary_embedding": rotary,
        "return_dict": False,
    }


def omnigen() -> nn.Module:
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=CHANNELS,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        num_layers=3,
        pad_token_id=0,
        vocab_size=16,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        pos_embed_max_size=SIZE,
    )
    return randomise(model)


def omnigen_inputs(seed: int, time: float, batch: int) -> Inputs:
    before = WORDS + 1  # words and a token of the time, which do not see the image
    mask = torch.ones(before + GRID * GRID, before + GRID * GRID)
    mask[:before] = mask[:before].tril()
    return {
        "hidden_states": latent(seed, batch),
        "timestep": times(1 - time, batch),
        "input_ids": torch.arange(1, 1 + WORDS).expand(batch, -1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask.expand(batch, -1, -1),
        "position_ids": torch.arange(len(mask)).expand(batch, -1),
        "return_dict": False,
    }


IMAGE: dict[str, Tiny] = {
    "DiTTransformer2DModel": Tiny(dit, dit_inputs, "epsilon"),
    "PixArtTransformer2DModel": Tiny(pixart, pixart_inputs, "epsilon"),
    "SD3Transformer2DModel": Tiny(sd3, sd3_inputs, "flow_prediction"),
    "SD3Transformer2DModel dual": Tiny(sd3_dual, sd3_inputs, "flow_prediction"),
    "FluxTransformer2DModel": Tiny(flux, flux_inputs, "flow_prediction"),
    "Flux2Transformer2DModel": Tiny(flux2, flux2_inputs, "flow_prediction"),
    "ChromaTransformer2DModel": Tiny(chroma, chroma_inputs, "flow_prediction"),
    "AuraFlowTransformer2DModel": Tiny(auraflow, auraflow_inputs, "flow_prediction"),
    "SanaTransformer2DModel": Tiny(sana, sana_inputs, "flow_prediction"),
    "Lumina2Transformer2DModel": Tiny(lumina2, lumina2_inputs, "flow_prediction"),
    "HunyuanDiT2DModel": Tiny(hunyuan_dit, hunyuan_dit_inputs, "v_prediction"),
    "QwenImageTransformer2DModel": Tiny(qwen, qwen_inputs, "flow_prediction"),
    "ZImageTransformer2DModel": Tiny(z_image, z_image_inputs, "flow_prediction"),
    "CogView3PlusTransformer2DModel": Tiny(cogview3, cogview_inputs, "v_prediction"),
    "CogView4Transformer2DModel": Tiny(cogview4, cogview_inputs, "flow_prediction"),
    "HiDreamImageTransformer2DModel": Tiny(hidream, hidream_inputs, "flow_prediction"),
    "StableAudioDiTModel": Tiny(stable_audio, stable_audio_inputs, "v_prediction"),
    "OmniGenTransformer2DModel": Tiny(omnigen, omnigen_inputs, "flow_prediction"),
}

BLOCKS: dict[str, tuple[str, ...]] = {
    "DiTTransformer2DModel": ("transformer_blocks",),
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "SD3Transformer2DModel": ("transformer_blocks",),
    "SD3Transformer2DModel dual": ("transformer_blocks",),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "Flux2Transformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "ChromaTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
    "AuraFlowTransformer2DModel": ("joint_transformer_blocks", "single_transformer_blocks"),
    "SanaTransformer2DModel": ("transformer_blocks",),
    "Lumina2Transformer2DModel": ("context_refiner", "noise_refiner", "layers"),
    "HunyuanDiT2DModel": ("blocks",),
    "QwenImageTransformer2DModel": ("transformer_blocks",),
    "ZImageTransformer2DModel": ("noise_refiner", "context_refiner", "layers"),
    "CogView3PlusTransformer2DModel": ("transformer_blocks",),
    "CogView4Transformer2DModel": ("transformer_blocks",),
    "HiDreamImageTransformer2DModel": ("double_stream_blocks", "single_stream_blocks"),
    "StableAudioDiTModel": ("transformer_blocks",),
    "OmniGenTransformer2DModel": ("layers",),
}
