"""The networks of a discriminator of images: VAE and DINO, and what they cost. Both are small
beside the base, so that an assumed DINO does no harm.
"""

from __future__ import annotations

from pathlib import Path

from ...config import Config, DataSection
from ...models.family import family_of
from ...models.vae import Published
from ...stages import DiscriminatorSection, GANSection
from .shape import read_config, weight_bytes

# DINOv2 with registers, base; assumed for every hub id
DINO_PARAMETERS, DINO_PATCH = 85_820_928, 14


def judged_latents(gan: GANSection, config: Config) -> int:
    """Of a decoded crop."""
    family, data = family_of(config.model.path), config.data
    side = (
        data.resolution if isinstance(data, DataSection) else family.size[0]
    ) // family.vae.pixels
    return min(gan.crop, side) ** 2


def vae_scale(config: Config) -> float:
    """Width of the layers of the base's VAE over the published one's; 1 without a local file."""
    family = family_of(config.model.path)
    key, width = family.vae.published.width
    values = read_config(Path(family.locate(config.model.path)) / "vae" / "config.json")
    return values.get(key, width) / width


def published(config: Config) -> Published:
    """The published VAE of the base's family."""
    return family_of(config.model.path).vae.published


def decode_flop(latents: int, config: Config) -> float:
    return published(config).flop * latents * vae_scale(config) ** 2


def decode_bytes(latents: int, config: Config) -> float:
    """For the gradient of a decoded crop."""
    return published(config).numbers * latents * vae_scale(config) * weight_bytes(config)


def has_images(gan: DiscriminatorSection | None) -> bool:
    """Whether decoded crops are judged."""
    return isinstance(gan, GANSection) and gan.features != "latent"


def dino_of(gan: GANSection) -> tuple[int, int]:
    """Parameters and patch size of a local DINO folder by its configuration; else those assumed."""
    values = read_config(Path(gan.features) / "config.json")
    if not values:
        return DINO_PARAMETERS, DINO_PATCH
    width, layers = values.get("hidden_size", 768), values.get("num_hidden_layers", 12)
    return 12 * width**2 * layers, values.get("patch_size", DINO_PATCH)


def dino_flop(gan: GANSection, config: Config) -> float:
    """Of one look at a crop: 2 per parameter and token."""
    if gan.features == "pixels":
        return 0.0
    parameters, patch = dino_of(gan)
    side = judged_latents(gan, config) ** 0.5 - 2 * gan.halo
    count = (side * family_of(config.model.path).vae.pixels // patch) ** 2
    return 2 * parameters * count


def network_bytes(gan: GANSection, config: Config) -> float:
    """Weights of VAE and DINO in the base's precision."""
    vae = published(config).parameters * vae_scale(config) ** 2
    return weight_bytes(config) * (vae + (0 if gan.features == "pixels" else dino_of(gan)[0]))


def head_parameters(gan: DiscriminatorSection, channels: int) -> int:
    """Of the trained heads on features of `channels`: two 1x1 convolutions, one 3x3, two norms."""
    if getattr(gan, "features", "") == "pixels":
        return 16 * gan.width * (gan.width // 2 + gan.width // 8) + 16 * 3 * gan.width // 4
    width = gan.width
    head = channels * width + 9 * width**2 + 7 * width
    return head * len(gan.layers)
