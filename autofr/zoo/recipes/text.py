"""The text half of `sd`: tokenizer, text tower, and the image tower that scores alignment."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from autofr.errors import UserError
from autofr.measure.alignment import read_towers
from autofr.measure.quality import Encoder
from autofr.zoo import glyphs
from autofr.zoo.loop import train

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 16
WIDTH = 128
SYNONYMS = {"automobile": "car", "airplane": "plane", "bicycle": "bike", "motorcycle": "motorbike"}
"""Words that users write where Unicode has another."""


def build_tokenizer(names: Sequence[str], size: int = 2182) -> Any:
    """A CLIPTokenizer whose vocabulary is trained on `names` by byte pair encoding.

    Every byte is in it, also as the end of a word, so that any text can be encoded. The same names
    give the same vocabulary: the trainer breaks ties by id, so all letters are given theirs.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in alphabet]
    empty = {token: number for number, token in enumerate([START, END, *alphabet, *ends])}
    as_clip = CLIPTokenizer(vocab=empty, merges=[]).backend_tokenizer
    learnt = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    learnt.normalizer, learnt.pre_tokenizer = as_clip.normalizer, as_clip.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=list(empty),
        show_progress=False,
    )
    every = [*names, *SYNONYMS.values(), *string.printable]
    learnt.train_from_iterator(every, trainer)
    merges = [tuple(pair) for pair in _merges(learnt)]
    vocabulary = dict(empty)
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    pairs: Any = merges  # what the backend takes; its annotation says less
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=TOKENS)


def _merges(tokenizer: Any) -> list[Sequence[str]]:
    import json

    found = json.loads(tokenizer.to_str())["model"]["merges"]
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in found]


def build_text_encoder(tokenizer: Any) -> torch.nn.Module:
    """A CLIPTextModel of 3 layers, 128 wide, for up to 16 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: Any, prompts: Sequence[str]) -> torch.Tensor:
    """Token ids (n, 16), as StableDiffusionPipeline makes them."""
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


class Reader:
    """The text tower as the denoiser uses it: prompts to hidden states (n, 16, 128)."""

    def __init__(self, tokenizer: Any, encoder: torch.nn.Module) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> torch.Tensor:
        device = next(self.encoder.parameters()).device
        return self.encoder(encode(self.tokenizer, prompts).to(device)).last_hidden_state


def vary(name: str, generator: torch.Generator) -> str:
    """What a user might write for an emoji: its name, or some of its words, or a synonym.

    Half of the prompts are the whole name; of the others each word stays with probability 0.6.
    """
    words = [word.strip(":,") for word in name.lower().split()]
    if torch.rand((), generator=generator) < 0.5:
        words = [SYNONYMS.get(word, word) for word in words]
    if torch.rand((), generator=generator) < 0.5:
        return " ".join(words)
    stays = torch.rand(len(words), generator=generator) < 0.6
    some = [word for word, stay in zip(words, stays.tolist(), strict=True) if stay]
    return " ".join(some or words)


def fit(
    tokenizer: Any,
    images: torch.Tensor,
    names: Sequence[str],
    seconds: float,
    work: Path,
    seed: int,
) -> torch.nn.ModuleDict:
    """Train image tower, text tower and projection to find each other (CLIP's loss).

    `images` (n, 3, s, s) in [-1, 1] are the glyphs of `names`. Radford et al. 2021, section 2.3.
    """
    torch.manual_seed(seed)
    towers = torch.nn.ModuleDict(
        {
            "image": Encoder(WIDTH),
            "text": build_text_encoder(tokenizer),
            "projection": torch.nn.Linear(WIDTH, WIDTH, bias=False),
        }
    ).to(images.device)

    def loss(step: int, fraction: float, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randperm(len(names), generator=generator)[:64]
        view = glyphs.augment(
            images[pick.to(images.device)], generator, rotate=15, scale=(0.75, 1.05), shift=0.1
        )
        level = 0.1 * torch.rand((64, 1, 1, 1), generator=generator).to(view)
        view = view + level * torch.randn(view.shape, generator=generator).to(view)
        prompts = [vary(names[i], generator) for i in pick.tolist()]
        tokens = encode(tokenizer, prompts).to(images.device)
        seen = F.normalize(towers["image"](view / 2 + 0.5), dim=1)
        read = F.normalize(towers["projection"](towers["text"](tokens).pooler_output), dim=1)
        logits, right = 20 * seen @ read.T, torch.arange(64, device=images.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    train("text", towers, loss, seconds, work, seed=seed, lr=1e-3)
    return towers.eval()


def load(folder: Path) -> tuple[Any, torch.nn.ModuleDict]:
    """Tokenizer and towers of an exported folder.

    Raises: UserError when they are not all there.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"--init {folder}: no {name}, expected a folder that a recipe exported")
    found = read_towers(folder)
    if found is None:
        raise UserError(f"--init {folder}: no alignment.safetensors beside the weights")
    image, weight = found
    projection = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = torch.nn.Parameter(weight)
    tower = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
    towers = {"image": image, "text": tower, "projection": projection}
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), torch.nn.ModuleDict(towers).eval()
