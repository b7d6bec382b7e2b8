"""Tiny models of the U-Nets of diffusers, and what their pipelines call them with."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from tiny import Tiny, randomise
from tiny_image import (
    CHANNELS,
    SIZE,
    WIDTH,
    WORDS,
    Inputs,
    latent,
    noise,
    pooled,
    text,
    times,
    words,
)
from torch import nn

FRAMES = 3
IMAGE = {"in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": SIZE}
LEVELS = {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8}
CROSS = {"cross_attention_dim": WIDTH, "attention_head_dim": 2}
SIMPLE_CROSS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "encoder_hid_dim": WIDTH,
}


def step(time: float) -> torch.Tensor:
    """Give a training step as the schedulers do: one integer for the whole batch."""
    return torch.tensor(round(999 * time))


def video(seed: int, batch: int) -> torch.Tensor:
    return noise(seed, batch, CHANNELS, FRAMES, SIZE, SIZE)


def beside(seed: int, batch: int, channels: int) -> torch.Tensor:
    """A latent, and further channels of its picture to the end of the sampling."""
    return torch.cat([latent(seed, batch), noise(4000, batch, channels, SIZE, SIZE)], dim=1)


def ddpm(**variant: Any) -> nn.Module:
    model = diffusers.UNet2DModel(
        **IMAGE | LEVELS | variant,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return randomise(model)


def ddpm_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {"sample": latent(seed, batch), "timestep": step(time), "return_dict": False}


def super_resolution() -> nn.Module:
    return ddpm(in_channels=6, out_channels=3)


def super_resolution_inputs(seed: int, time: float, batch: int) -> Inputs:
    small = noise(4000, batch, 3, SIZE, SIZE)
    sample = torch.cat([noise(seed, batch, 3, SIZE, SIZE), small], dim=1)
    return {"sample": sample, "timestep": step(time), "return_dict": False}


def conditional(**variant: Any) -> nn.Module:
    return randomise(diffusers.UNet2DConditionModel(**IMAGE | LEVELS | CROSS | variant))


def sd(**variant: Any) -> nn.Module:
    return conditional(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **variant,
    )


def sd_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": latent(seed, batch),
        "timestep": step(time),
        "encoder_hidden_states": text(batch),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
        "return_dict": False,
    }


def inpaint() -> nn.Module:
    return sd(in_channels=2 * CHANNELS + 1)


def inpaint_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {**sd_inputs(seed, time, batch), "sample": beside(seed, batch, CHANNELS + 1)}


def sdxl(**variant: Any) -> nn.Module:
    return conditional(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        **variant,
    )


def sdxl_inputs(seed: int, time: float, batch: int) -> Inputs:
    sizes = torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0]).expand(batch, -1)
    added = {"text_embeds": pooled(batch), "time_ids": sizes}
    return {**sd_inputs(seed, time, batch), "added_cond_kwargs": added}


def kolors() -> nn.Module:
    return sdxl(encoder_hid_dim=2 * WIDTH, encoder_hid_dim_type="text_proj")


def kolors_inputs(seed: int, time: float, batch: int) -> Inputs:
    words_of_glm = noise(1000, batch, WORDS, 2 * WIDTH)
    return {**sdxl_inputs(seed, time, batch), "encoder_hidden_states": words_of_glm}


def kandinsky() -> nn.Module:
    return conditional(
        **SIMPLE_CROSS,
        out_channels=2 * CHANNELS,
        addition_embed_type="image",
        encoder_hid_dim_type="image_proj",
    )


def kandinsky_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": latent(seed, batch),
        "timestep": step(time),
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": pooled(batch)},
        "return_dict": False,
    }


def deepfloyd() -> nn.Module:
    return conditional(
        **SIMPLE_CROSS,
        in_channels=3,
        out_channels=6,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        encoder_hid_dim_type="text_proj",
        act_fn="gelu",
        time_embedding_act_fn="gelu",
        cross_attention_norm="group_norm",
        mid_block_scale_factor=2**0.5,
        resnet_out_scale_factor=2**0.5,
        resnet_skip_time_act=True,
    )


def deepfloyd_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": noise(seed, batch, 3, SIZE, SIZE),
        "timestep": step(time),
        "encoder_hidden_states": text(batch),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def upscaler() -> nn.Module:
    return conditional(
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS + 1,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        block_out_channels=(32, 64, 64),  # groups of 32 channels; the last twice the first
        norm_num_groups=None,
        attention_head_dim=8,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=WIDTH,
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )


def upscaler_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": beside(seed, batch, CHANNELS),
        "timestep": torch.tensor(2 * time - 1),  # a quarter of the logarithm of sigma
        "encoder_hidden_states": text(batch),
        "timestep_cond": pooled(batch),
        "return_dict": False,
    }


def stable_video() -> nn.Module:
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE,
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 64),  # multiples of 32, which the class takes as its groups
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        num_frames=FRAMES,
    )
    return randomise(model)


def stable_video_inputs(seed: int, time: float, batch: int) -> Inputs:
    sample = torch.cat([video(seed, batch), video(4000, batch)], dim=1)
    return {
        "sample": sample.transpose(1, 2),
        "timestep": torch.tensor(3.2 * time - 1.6),  # a quarter of the logarithm of sigma
        "encoder_hidden_states": pooled(batch)[:, None],
        "added_time_ids": torch.tensor([6.0, 127.0, 0.02]).expand(batch, -1),
        "return_dict": False,
    }


def three_dimensional(kind: type[nn.Module]) -> nn.Module:
    model = kind(
        **IMAGE | LEVELS,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
    )
    return randomise(model)


def unet3d() -> nn.Module:
    return three_dimensional(diffusers.UNet3DConditionModel)


def unet3d_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": video(seed, batch),
        "timestep": step(time),
        "encoder_hidden_states": text(batch),
        "cross_attention_kwargs": None,
        "return_dict": False,
    }


def i2vgen() -> nn.Module:
    return three_dimensional(diffusers.I2VGenXLUNet)


def i2vgen_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        **unet3d_inputs(seed, time, batch),
        "fps": torch.full((batch,), 16),
        "image_latents": video(4000, batch),
        "image_embeddings": pooled(batch),
    }


def motion() -> nn.Module:
    model = diffusers.UNetMotionModel(
        **IMAGE | LEVELS,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        motion_max_seq_length=2 * FRAMES,
        motion_num_attention_heads=2,
    )
    return randomise(model)


def motion_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        **unet3d_inputs(seed, time, batch),
        "encoder_hidden_states": text(batch).repeat_interleave(FRAMES, dim=0),
        "added_cond_kwargs": None,
    }


def kandinsky3() -> nn.Module:
    model = diffusers.Kandinsky3UNet(
        in_channels=CHANNELS,
        time_embedding_dim=32,
        groups=4,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 32, 32),  # the class has no attention at the first of four
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
    )
    return randomise(model)


def kandinsky3_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": noise(seed, batch, CHANNELS, 2 * SIZE, 2 * SIZE),  # 2×2 at the last level
        "timestep": step(time),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": words(batch),
        "return_dict": False,
    }


def cascade(**variant: Any) -> nn.Module:
    model = diffusers.StableCascadeUNet(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        timestep_ratio_embedding_dim=16,
        conditioning_dim=WIDTH,
        block_out_channels=(16, 32),
        down_num_layers_per_block=(2, 2),
        up_num_layers_per_block=(2, 2),
        clip_text_pooled_in_channels=WIDTH,
        clip_seq=2,
        **variant,
    )
    return randomise(model)


def cascade_prior() -> nn.Module:
    return cascade(
        num_attention_heads=(2, 2),
        clip_text_in_channels=WIDTH,
        clip_image_in_channels=WIDTH,
        switch_level=(False,),
    )


def cascade_prior_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": latent(seed, batch),
        "timestep_ratio": times(time, batch),
        "clip_text_pooled": pooled(batch)[:, None],
        "clip_text": text(batch),
        "clip_img": noise(3000, batch, 1, WIDTH),
        "return_dict": False,
    }


def cascade_decoder() -> nn.Module:
    residual = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    return cascade(
        patch_size=2,
        num_attention_heads=(-1, 2),
        up_blocks_repeat_mappers=(2, 2),
        block_types_per_layer=(residual, (*residual, "SDCascadeAttnBlock")),
        effnet_in_channels=CHANNELS,
        timestep_conditioning_type=("sca",),
    )


def cascade_decoder_inputs(seed: int, time: float, batch: int) -> Inputs:
    return {
        "sample": latent(seed, batch),
        "timestep_ratio": times(time, batch),
        "clip_text_pooled": pooled(batch)[:, None],
        "effnet": noise(4000, batch, CHANNELS, 3, 3),
        "return_dict": False,
    }


UNET: dict[str, Tiny] = {
    "UNet2DModel": Tiny(ddpm, ddpm_inputs, "epsilon"),
    "UNet2DModel conditional resolution": Tiny(
        super_resolution, super_resolution_inputs, "epsilon"
    ),
    "UNet2DConditionModel sd": Tiny(sd, sd_inputs, "epsilon"),
    "UNet2DConditionModel inpaint": Tiny(inpaint, inpaint_inputs, "epsilon"),
    "UNet2DConditionModel sdxl": Tiny(sdxl, sdxl_inputs, "epsilon"),
    "UNet2DConditionModel kolors": Tiny(kolors, kolors_inputs, "epsilon"),
    "UNet2DConditionModel kandinsky": Tiny(kandinsky, kandinsky_inputs, "epsilon"),
    "UNet2DConditionModel if": Tiny(deepfloyd, deepfloyd_inputs, "epsilon"),
    "UNet2DConditionModel upscaler": Tiny(upscaler, upscaler_inputs, "v_prediction"),
    "UNetSpatioTemporalConditionModel": Tiny(stable_video, stable_video_inputs, "v_prediction"),
    "UNet3DConditionModel": Tiny(unet3d, unet3d_inputs, "epsilon"),
    "I2VGenXLUNet": Tiny(i2vgen, i2vgen_inputs, "v_prediction"),
    "UNetMotionModel": Tiny(motion, motion_inputs, "epsilon"),
    "Kandinsky3UNet": Tiny(kandinsky3, kandinsky3_inputs, "epsilon"),
    "StableCascadeUNet prior": Tiny(cascade_prior, cascade_prior_inputs, "epsilon"),
    "StableCascadeUNet decoder": Tiny(cascade_decoder, cascade_decoder_inputs, "epsilon"),
}
