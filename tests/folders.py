"""Tiny pipelines of every kind, randomly initialised, as `save_pretrained` writes them."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from conformance.tiny import randomise
from PIL import Image

from autofr.policy import Guidance

CHANNELS, SIZE, WIDTH, WORDS = 4, 8, 32, 16  # of latents and of texts
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SQUARE = {"sample_size": SIZE, "patch_size": 2, "in_channels": CHANNELS}
ROPE = (4, 6, 6)


@dataclass(frozen=True)
class Family:
    """One kind of pipeline: how it is built, and what it draws from.

    `inputs` differ from sample to sample, `call` is shared; `guidance` says how its branches run.
    """

    build: Callable[[], Any]
    guidance: Guidance
    inputs: tuple[Mapping[str, Any], ...]
    call: Mapping[str, Any] = field(default_factory=dict)


def write(name: str, folder: Path) -> Path:
    """Write a family's pipeline into a folder, with the same weights every time."""
    FAMILIES[name].build().save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    """A picture of coloured noise, as large as what the tiny pipelines draw."""
    noise = np.random.default_rng(seed).integers(0, 256, (2 * SIZE, 2 * SIZE, 3), dtype=np.uint8)
    return Image.fromarray(noise)


# -- texts and pictures ---------------------------------------------------------------------------


def clip_tokenizer() -> Any:
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{one}</w>" for one in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=WORDS)


def clip(width: int = WIDTH, projected: bool = False) -> torch.nn.Module:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=WORDS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomise(kind(config))


def t5_tokenizer() -> Any:
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation, "▁"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((one, -1.0) for one in letters)]
    return transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=WORDS)


def t5(kind: str = "T5") -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=2,
        num_heads=2,
    )
    return randomise(getattr(transformers, f"{kind}EncoderModel")(config))


def clip_vision() -> torch.nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        patch_size=56,  # SVD gives pictures of 224×224 pixels
    )
    return randomise(transformers.CLIPVisionModelWithProjection(config))


def vae(**variant: Any) -> torch.nn.Module:
    """Pictures are twice as large as latents."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=CHANNELS,
        mid_block_add_attention=False,
        **variant,
    )
    return model.eval().requires_grad_(False)


# -- Stable Diffusion -----------------------------------------------------------------------------


def ddim(**variant: Any) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **variant,
    )


def unet(**variant: Any) -> torch.nn.Module:
    """Two levels, with spatial transformers on the upper one."""
    given = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": WIDTH,
    } | variant
    model = diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        **given,
    )
    return randomise(model)


def sd(**variant: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(),
        scheduler=ddim(**variant),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd2() -> Any:
    return sd(prediction_type="v_prediction")


def sdxl() -> Any:
    added = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(**added),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(ddim().config),
    )


def upscaler() -> Any:
    model = diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=6,
        out_channels=3,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )
    torch.manual_seed(0)
    autoencoder = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        num_vq_embeddings=16,
        mid_block_add_attention=False,
    )
    return diffusers.LDMSuperResolutionPipeline(
        vqvae=autoencoder.eval().requires_grad_(False), unet=randomise(model), scheduler=ddim()
    )


# -- transformers ---------------------------------------------------------------------------------


def dit() -> Any:
    model = diffusers.DiTTransformer2DModel(
        **HEADS,
        **SQUARE,
        out_channels=2 * CHANNELS,  # with the learned variance
        num_layers=2,
        num_embeds_ada_norm=1000,  # the pipeline takes the next one for no class
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return diffusers.DiTPipeline(transformer=randomise(model), vae=vae(), scheduler=scheduler)


def sd3() -> Any:
    model = diffusers.SD3Transformer2DModel(
        **HEADS,
        **SQUARE,
        num_layers=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH,
        out_channels=CHANNELS,
        pos_embed_max_size=SIZE,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomise(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(WIDTH // 2, projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(WIDTH // 2, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


def flux() -> Any:
    model = diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=ROPE,
    )
    return diffusers.FluxPipeline(
        transformer=randomise(model),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


# -- videos ---------------------------------------------------------------------------------------


def svd() -> Any:
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2,
        block_out_channels=(32, 32),  # the class takes groups of 32
        layers_per_block=1,
        latent_channels=CHANNELS,
    )
    model = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE,
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        block_out_channels=(32, 32),
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 2),
        num_frames=2,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return diffusers.StableVideoDiffusionPipeline(
        vae=autoencoder.eval().requires_grad_(False),
        image_encoder=clip_vision(),
        unet=randomise(model),
        scheduler=scheduler,
        feature_extractor=transformers.CLIPImageProcessor(size=32, crop_size=32),
    )


def wan_transformer(seed: int = 0) -> torch.nn.Module:
    model = diffusers.WanTransformer3DModel(
        **HEADS,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=SIZE,
    )
    return randomise(model, seed)


def wan(**variant: Any) -> Any:
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5("UMT5"),
        vae=autoencoder.eval().requires_grad_(False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=wan_transformer(),
        **variant,
    )


def wan22() -> Any:
    return wan(transformer_2=wan_transformer(1), boundary_ratio=0.5)


PROMPTS = ({"prompt": "a red bicycle"}, {"prompt": "two dogs"})
REFUSED = ({"negative_prompt": "blurred"}, {"negative_prompt": "a frame"})
GUIDED = {"guidance_scale": 3.0}
SHORT = {"max_sequence_length": WORDS}
SMALL = {"height": 2 * SIZE, "width": 2 * SIZE}
VIDEO = {"height": 32, "width": 32, "num_frames": 5}

FAMILIES: dict[str, Family] = {
    "sd": Family(sd, "batched", PROMPTS, GUIDED),
    "sd2": Family(sd2, "batched", PROMPTS, GUIDED),
    "sdxl": Family(sdxl, "batched", PROMPTS, GUIDED),
    "dit": Family(dit, "batched", ({"class_labels": 3}, {"class_labels": 7}), GUIDED),
    "sd3": Family(sd3, "batched", PROMPTS, GUIDED | SHORT),
    "flux": Family(flux, "none", PROMPTS, SHORT | SMALL),
    "flux guided": Family(
        flux,
        "split",
        tuple({**one, **other} for one, other in zip(PROMPTS, REFUSED, strict=True)),
        {"true_cfg_scale": 2.0} | SHORT | SMALL,
    ),
    "upscaler": Family(upscaler, "none", ({"image": picture(0)}, {"image": picture(1)})),
    "svd": Family(svd, "batched", ({"image": picture(0)}, {"image": picture(1)}), SMALL),
    "wan": Family(wan, "split", PROMPTS, GUIDED | SHORT | VIDEO),
    "wan22": Family(wan22, "split", PROMPTS, GUIDED | SHORT | VIDEO),
}
