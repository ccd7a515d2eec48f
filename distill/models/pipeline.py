"""A base model ready to draw: with LoRAs of any rank and spelling, and as its own teacher."""

from __future__ import annotations

import gc
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from ..config import TINY, AdapterSection, ConfigError, GuidanceSection, Quantize
from ..contract.lora_keys import LoraFormatError, NormalisedLora
from ..contract.spec import UNKNOWN_BASE, TurboSpec
from ..contract.tiny import BASE_NAME, GUIDANCE, IMAGE_SIZE
from ..tiny.family import TinyTextEncoder
from ..utils.images import from_unit
from .hub import model_folder
from .load import load_transformer, load_vae
from .qwen_image import Text
from .roles import TEACHER, Roles
from .sample import noise_of_seeds, pipeline_sigmas, sample_student, sample_teacher
from .sizes import LATENT, SQUARE, TOKEN, Size
from .text_encoder import QwenTextEncoder, TextEncoder
from .vae import decode

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_BATCH = 8

Prepare = Callable[[QwenImageTransformer2DModel], None]


@dataclass(frozen=True)
class Base:
    """Where a base model lies."""

    path: str  # as `load_transformer` takes it
    folder: Path
    tiny: bool  # then prompts become vectors without a text encoder

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes here: bfloat16 on a GPU."""
        half = torch.cuda.is_available() and not self.tiny
        return torch.bfloat16 if half else torch.float32

    def text_encoder(self, device: torch.device) -> TextEncoder:
        return TinyTextEncoder() if self.tiny else QwenTextEncoder(self.folder, device, self.dtype)


def find_base(spec: TurboSpec, model: str | None = None) -> Base:
    """The base that a LoRA was made for, or `model`: a folder in diffusers layout or a hub id.

    Raises ConfigError where there is none.
    """
    tiny = spec.base == BASE_NAME
    if model is None and spec.base == UNKNOWN_BASE:
        raise ConfigError(
            "--model: expected the base model, for the LoRA's file does not name it: a folder in "
            "diffusers layout or a hub id such as Qwen/Qwen-Image-2512."
        )
    path = model or (TINY if tiny else spec.base)
    if model is None and "/" not in path and path != TINY and not Path(path).is_dir():
        raise ConfigError(
            f"--model: the LoRA was trained on a local folder named {path!r}, whose place its "
            "header does not tell; expected where that folder lies, or the hub id of that model."
        )
    folder = model_folder(path, PARTS)
    assert folder is not None  # it would have been downloaded
    return Base(path if path == TINY else str(folder), folder, tiny)


def image_size(spec: TurboSpec, base: Base, size: Size | None) -> Size:
    """Width and height in pixels: as asked for, else the first that the LoRA was trained on.

    Raises ConfigError unless both are whole tokens.
    """
    default = (IMAGE_SIZE, IMAGE_SIZE) if base.tiny else (SQUARE, SQUARE)
    chosen = size or next(iter(spec.resolutions), default)
    if any(side < TOKEN or side % TOKEN for side in chosen):
        raise ConfigError(
            f"--size: expected multiples of {TOKEN} pixels, found {chosen[0]}x{chosen[1]}."
        )
    return chosen


def teacher_guidance(
    metadata: Mapping[str, str], base: Base, scale: float | None = None
) -> GuidanceSection:
    """The teacher's guidance: what the LoRA was distilled from if its header tells, else the base
    model's usual one; `scale` overrules that of either. Raises ConfigError for a damaged header.
    """
    guidance = _usual_guidance(metadata, base)
    if scale is None:
        return guidance
    if scale < 1:
        raise ConfigError(f"--guidance: expected 1 (none) or more, found {scale:g}.")
    return guidance.model_copy(update={"scale": scale})


def _usual_guidance(metadata: Mapping[str, str], base: Base) -> GuidanceSection:
    if "turbo.config" in metadata:
        try:
            return GuidanceSection.model_validate(json.loads(metadata["turbo.config"])["guidance"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"header 'turbo.config': the guidance in it cannot be read ({error}); export the "
                "LoRA again, or take it from its run folder."
            ) from error
    if base.tiny:
        return GuidanceSection(scale=GUIDANCE, rescale=False)
    return GuidanceSection()


def embed(base: Base, prompts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """Embeddings of prompts and of the teacher's negative one, "", in main memory.  # [L, D] each

    The text encoder is gone when this returns: it need not fit beside the transformer.
    Raises ValueError for a prompt that the model cannot read.
    """
    encoder = base.text_encoder(device)
    wanted = list(dict.fromkeys(prompts))
    for prompt in wanted:
        if reason := encoder.refuses(prompt):
            raise ValueError(reason)
    negative = "" if base.tiny else " "  # diffusers' Qwen-Image wants a blank
    words = [negative, *wanted]
    vectors = []
    for start in range(0, len(words), TEXT_BATCH):
        vectors += [x.float().cpu() for x in encoder.encode(words[start : start + TEXT_BATCH])]
    del encoder
    free_memory()
    return dict(zip(["", *wanted], vectors, strict=True))


def free_memory() -> None:
    """Gives back what models that are gone have held, also those that referred to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def as_text(rows: Sequence[Tensor]) -> Text:
    """Embeddings [L, D] of several prompts as one batch, padded where lengths differ."""
    lengths = torch.tensor([len(row) for row in rows])
    embeds = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    if int(lengths.min()) == embeds.shape[1]:
        return Text(embeds)
    return Text(embeds, torch.arange(embeds.shape[1]) < lengths[:, None])


class Pipeline:
    """A base model on its device, with LoRAs beside its weights, each under a name."""

    def __init__(
        self,
        base: Base,
        loras: Mapping[str, NormalisedLora],
        guidance: GuidanceSection,
        texts: Mapping[str, Tensor],
        device: torch.device,
        *,
        quantize: Quantize = "none",
        prepare: Prepare | None = None,
    ) -> None:
        """texts: from `embed`; prepare: changes the transformer before LoRAs are attached."""
        free_memory()  # of an earlier painter
        self.base, self.texts, self.device = base, texts, device
        transformer = load_transformer(base.path, base.dtype, quantize).requires_grad_(False)
        if prepare:
            prepare(transformer)
        self._role = {name: f"lora_{i}" for i, name in enumerate(loras)}  # PEFT allows no dots
        for name, lora in loras.items():
            attach(transformer, self._role[name], lora)
        transformer.to(device).eval()
        self.channels = transformer.config.in_channels // 4
        negative = Text(texts[""][None].to(device))
        self.roles = Roles(transformer, AdapterSection(), guidance, negative, 0, adapters=())
        self.vae = load_vae(base.path).to(device)

    @torch.no_grad()
    def student(
        self,
        name: str | None,
        spec: TurboSpec,
        prompts: Sequence[str],
        seeds: Sequence[int],
        size: Size,
    ) -> Tensor:
        """Images with the LoRA `name` (None: the base alone), as the spec says.  # [B, 3, H, W]
        uint8
        """
        noise, text = self._inputs(prompts, seeds, size)
        role = TEACHER if name is None else self._role[name]
        return self._images(sample_student(self.roles, spec, noise, text, list(seeds), role))

    @torch.no_grad()
    def teacher(
        self, steps: int, prompts: Sequence[str], seeds: Sequence[int], size: Size
    ) -> Tensor:
        """Images without LoRA: many guided steps on the base's own schedule.  # [B, 3, H, W]"""
        noise, text = self._inputs(prompts, seeds, size)
        sigmas = pipeline_sigmas(self.base.folder, steps, size)
        return self._images(sample_teacher(self.roles, sigmas, noise, text))

    def _inputs(
        self, prompts: Sequence[str], seeds: Sequence[int], size: Size
    ) -> tuple[Tensor, Text]:
        noise = noise_of_seeds(seeds, self.channels, size).to(self.device)
        return noise, as_text([self.texts[prompt] for prompt in prompts]).to(self.device)

    def _images(self, latents: Tensor) -> Tensor:
        """As many at a time as make one large image, whose decoder takes gigabytes."""
        rows = max(1, SQUARE**2 // (latents[0, 0].numel() * LATENT**2))
        images = torch.cat([decode(self.vae, part) for part in latents.float().split(rows)])
        return from_unit(images).cpu()


def scaled(lora: NormalisedLora, strength: float) -> NormalisedLora:
    """The LoRA at a strength."""
    modules = {n: replace(m, alpha=m.alpha * strength) for n, m in lora.modules.items()}
    return replace(lora, modules=modules)


@torch.no_grad()
def attach(transformer: QwenImageTransformer2DModel, role: str, lora: NormalisedLora) -> None:
    """Puts a LoRA beside the weights as PEFT adapter `role`, in float32 as in training.

    The scale is multiplied into lora_B, so ranks may differ. Raises LoraFormatError where it does
    not fit.
    """
    check_fit(transformer, lora)
    ranks = {re.escape(name): module.rank for name, module in lora.modules.items()}
    config = LoraConfig(
        target_modules=list(lora.modules),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        init_lora_weights=False,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
        transformer.add_adapter(config, adapter_name=role)
    for name, module in lora.modules.items():
        layer = transformer.get_submodule(name)
        layer.lora_A[role].weight.data = module.down.float().clone()
        layer.lora_B[role].weight.data = module.up.float() * module.scale


def check_fit(transformer: QwenImageTransformer2DModel, lora: NormalisedLora) -> None:
    """Raises LoraFormatError unless every module of the LoRA has its linear layer in the base."""
    layers = dict(transformer.named_modules())
    for name, module in lora.modules.items():
        layer = layers.get(name)
        found = [module.up.shape[0], module.down.shape[1]]
        if not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
            raise LoraFormatError(
                f"{lora.source}: the base has no linear layer {name!r}. Was the LoRA made for "
                "another model? Name its base with --model."
            )
        expected = [layer.out_features, layer.in_features]
        if found != expected:
            raise LoraFormatError(
                f"{lora.source}: {name}: expected a LoRA for a weight {expected}, found {found}. "
                "It was made for a model of another size; name its base with --model."
            )
