"""How well the tiny teacher draws, at 50 guided steps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

from ..contract.sampling import sample_euler, velocity_denoiser
from ..contract.schedule import schedule
from ..contract.tiny import GUIDANCE, IMAGE_SIZE, SHIFT, STEPS, embed_prompt
from ..models.qwen_image import velocity_pair
from ..models.text import Text
from ..models.vae import decode, fold_single_frame
from . import classifier
from .metrics import Judge, digit_batch, letter_batch


def noise_of(batch_size: int, seed: int) -> torch.Tensor:
    """Initial noise of images.  # [batch_size, 16, 8, 8]"""
    return torch.randn(
        batch_size,
        16,
        IMAGE_SIZE // 8,
        IMAGE_SIZE // 8,
        generator=torch.Generator().manual_seed(seed),
    )


@torch.no_grad()
def draw(
    transformer: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    text: Text,
    noise: torch.Tensor,
    guidance: float = GUIDANCE,
) -> torch.Tensor:
    """Images of the undistilled model: [N, 16, 8, 8] -> [N, 3, 64, 64]"""
    sigmas = list(schedule(STEPS, shift=SHIFT))
    empty = Text(embed_prompt("")[None])
    images = []
    for chunk in torch.arange(len(noise)).split(100):
        prompts = Text(text.embeds[chunk])
        model = velocity_denoiser(
            lambda x, t, text=prompts: velocity_pair(
                transformer, x, t, text, empty, guidance, rescale=False
            )[1]
        )
        images.append(decode(vae, sample_euler(model, noise[chunk], sigmas)))
    return torch.cat(images)


def measure(
    folder: Path, per_letter_prompt: int = 20, per_digit: int = 50, seed: int = 0
) -> dict[str, object]:
    """Figures of the teacher in `folder`: 1,000 letters and 500 digits."""
    transformer = QwenImageTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    )
    vae = fold_single_frame(
        AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    )
    judge = Judge(classifier.load(folder / "classifier.safetensors"))
    text, number = letter_batch(per_letter_prompt)
    images = draw(transformer, vae, text, noise_of(len(number), seed))
    text, digit = digit_batch(per_digit)
    digits = draw(transformer, vae, text, noise_of(len(digit), seed + 1))
    letters = {
        k: v for k, v in asdict(judge.letters(images, number, images)).items() if k != "psnr"
    }
    return {
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "shift": SHIFT, "seed": seed},
        "letters": {"images": len(images), **letters},
        "digits": {"images": len(digits), "digit_accuracy": judge.digit_accuracy(digits, digit)},
    }
