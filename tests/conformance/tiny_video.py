"""Tiny models of the video transformers of diffusers, and what their pipelines call them with."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from tiny import Tiny, randomise
from tiny_image import (
    CHANNELS,
    GRID,
    HEADS,
    ROPE,
    SIZE,
    WIDTH,
    WORDS,
    Inputs,
    noise,
    pooled,
    text,
    times,
    words,
)
from torch import nn

FRAMES = 3  # of a latent; its tokens are 3×4×4 patches of 1×2×2 pixels


def video(seed: int, batch: int) -> torch.Tensor:
    return noise(seed, batch, CHANNELS, FRAMES, SIZE, SIZE)


def wan() -> nn.Module:
    model = diffusers.WanTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=3,
        rope_max_seq_len=SIZE,
    )
    return randomise(model)


def wan_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": video(seed, batch),
        "timestep": (1000 * times(time, batch)).long(),
        "encoder_hidden_states": text(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def ltx() -> nn.Module:
    model = diffusers.LTXVideoTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=WIDTH,
    )
    return randomise(model)


def ltx_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": noise(seed, batch, FRAMES * SIZE * SIZE, CHANNELS),
        "encoder_hidden_states": text(batch),
        "timestep": 1000 * times(time, batch),
        "encoder_attention_mask": words(batch),
        "num_frames": FRAMES,
        "height": SIZE,
        "width": SIZE,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def cogvideox() -> nn.Module:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=32,
        text_embed_dim=WIDTH,
        num_layers=3,
        sample_width=SIZE,
        sample_height=SIZE,
        sample_frames=4 * FRAMES - 3,
        max_text_seq_length=WORDS,
        use_rotary_positional_embeddings=True,
    )
    return randomise(model)


def cogvideox_inputs(seed: int, time: float, batch: int) -> Inputs:
    corners, grid = ((0, 0), (GRID, GRID)), (GRID, GRID)
    return {
        "hidden_states": video(seed, batch).transpose(1, 2),
        "encoder_hidden_states": text(batch),
        "timestep": (999 * times(time, batch)).long(),
        "image_rotary_emb": get_3d_rotary_pos_embed(16, corners, grid, FRAMES),
        "attention_kwargs": None,
        "return_dict": False,
    }


def hunyuan_video() -> nn.Module:
    model = diffusers.HunyuanVideoTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=2,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=ROPE,
    )
    return randomise(model)


def hunyuan_video_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": video(seed, batch),
        "timestep": 1000 * times(time, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "pooled_projections": pooled(batch),
        "guidance": torch.full((batch,), 6000.0),
        "attention_kwargs": None,
        "return_dict": False,
    }


def mochi() -> nn.Module:
    model = diffusers.MochiTransformer3DModel(
        **HEADS,
        num_layers=3,
        pooled_projection_dim=32,
        in_channels=CHANNELS,
        text_embed_dim=WIDTH,
        time_embed_dim=32,
        max_sequence_length=WORDS,
    )
    return randomise(model)


def mochi_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": video(seed, batch),
        "encoder_hidden_states": text(batch),
        "timestep": 1000 * times(1 - time, batch),
        "encoder_attention_mask": words(batch),
        "attention_kwargs": None,
        "return_dict": False,
    }


def latte() -> nn.Module:
    model = diffusers.LatteTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=2,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=SIZE,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        caption_channels=WIDTH,
        video_length=FRAMES,
    )
    return randomise(model)


def latte_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": video(seed, batch),
        "encoder_hidden_states": text(batch),
        "timestep": (999 * times(time, batch)).long(),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def allegro() -> nn.Module:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # a multiple of 6, for the rotation
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        cross_attention_dim=24,
        sample_height=SIZE,
        sample_width=SIZE,
        sample_frames=FRAMES,
        caption_channels=WIDTH,
    )
    return randomise(model)


def allegro_inputs(seed: int, time: float, batch: int) -> Inputs:
    corners, grid = ((0, 0), (GRID, GRID)), (GRID, GRID)
    rotary = get_3d_rotary_pos_embed_allegro(12, corners, grid, FRAMES)
    places = torch.cartesian_prod(*(axis.long() for axis in rotary[3:])).T[:, None]
    return {
        "hidden_states": video(seed, batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "timestep": (999 * times(time, batch)).long(),
        "image_rotary_emb": (rotary[:3], tuple(places)),
        "return_dict": False,
    }


def cosmos() -> nn.Module:
    model = diffusers.CosmosTransformer3DModel(
        **HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        text_embed_dim=WIDTH,
        adaln_lora_dim=8,
        max_size=(FRAMES, SIZE, SIZE),
        concat_padding_mask=False,  # the class resizes the mask with torchvision
    )
    return randomise(model)


def cosmos_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "hidden_states": video(seed, batch),
        "timestep": times(time, batch),
        "encoder_hidden_states": text(batch),
        "fps": 24,
        "return_dict": False,
    }


VIDEO: dict[str, Tiny] = {
    "WanTransformer3DModel": Tiny(wan, wan_inputs, "flow_prediction"),
    "LTXVideoTransformer3DModel": Tiny(ltx, ltx_inputs, "flow_prediction"),
    "CogVideoXTransformer3DModel": Tiny(cogvideox, cogvideox_inputs, "v_prediction"),
    "HunyuanVideoTransformer3DModel": Tiny(hunyuan_video, hunyuan_video_inputs, "flow_prediction"),
    "MochiTransformer3DModel": Tiny(mochi, mochi_inputs, "flow_prediction"),
    "LatteTransformer3DModel": Tiny(latte, latte_inputs, "epsilon"),
    "AllegroTransformer3DModel": Tiny(allegro, allegro_inputs, "epsilon"),
    "CosmosTransformer3DModel": Tiny(cosmos, cosmos_inputs, "flow_prediction"),
}

BLOCKS: dict[str, tuple[str, ...]] = {
    "WanTransformer3DModel": ("blocks",),
    "LTXVideoTransformer3DModel": ("transformer_blocks",),
    "CogVideoXTransformer3DModel": ("transformer_blocks",),
    "HunyuanVideoTransformer3DModel": ("transformer_blocks", "single_transformer_blocks"),
    "MochiTransformer3DModel": ("transformer_blocks",),
    "LatteTransformer3DModel": ("transformer_blocks", "temporal_transformer_blocks"),
    "AllegroTransformer3DModel": ("transformer_blocks",),
    "CosmosTransformer3DModel": ("transformer_blocks",),
}
