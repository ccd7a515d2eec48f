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
from torch import Tensor, nn

from ..config import AdapterSection, BaseLora, ConfigError, GuidanceSection, Quantize
from ..contract.lora_keys import NormalisedLora
from ..contract.spec import UNKNOWN_BASE, TurboSpec
from ..contract.tensor_file import is_finite
from ..utils.images import from_unit
from .base_lora import check_fit
from .family import Family, family_of, family_of_spec, path_of
from .hub import model_folder
from .load import load_transformer, load_vae
from .mixed_precision import lora_config
from .roles import TEACHER, Roles
from .sample import noise_of_seeds, sample_student, sample_teacher
from .sizes import Size
from .text import Text
from .text_encoder import TextEncoder

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TEXT_BATCH = 8

Prepare = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Base:
    """Where a base model lies."""

    path: str  # as `load_transformer` takes it
    folder: Path
    family: Family
    loras: tuple[BaseLora, ...] = ()  # merged into it

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes here; float32 without a GPU."""
        return self.family.gpu_dtype if torch.cuda.is_available() else torch.float32

    def text_encoder(self, device: torch.device) -> TextEncoder:
        return self.family.text_encoder(self.folder, device, self.dtype)


def find_base(spec: TurboSpec, model: str | None = None) -> Base:
    """The base that a LoRA was made for, or `model`: a folder in diffusers layout or a hub id.

    Raises ConfigError where there is none.
    """
    if model is None and spec.base == UNKNOWN_BASE:
        raise ConfigError(
            "--model: expected the base model, for the LoRA's file does not name it: a folder in "
            "diffusers layout or a hub id such as Qwen/Qwen-Image-2512."
        )
    path = model or path_of(spec)
    embedded = family_of(path).embedded
    if model is None and "/" not in path and not embedded and not Path(path).is_dir():
        raise ConfigError(
            f"--model: the LoRA was trained on a local folder named {path!r}, whose place its "
            "header does not tell; expected where that folder lies, or the hub id of that model."
        )
    folder = model_folder(path, PARTS)
    assert folder is not None  # it would have been downloaded
    path = path if embedded else str(folder)
    by_spec = family_of_spec(spec)  # of a copy of an embedded model in a folder
    return Base(path, folder, by_spec if by_spec.embedded else family_of(path))


def image_size(spec: TurboSpec, base: Base, size: Size | None) -> Size:
    """Width and height in pixels: as asked for, else the first that the LoRA was trained on.

    Raises ConfigError unless the base can draw them.
    """
    grid = base.family.grid
    chosen = size or next(iter(spec.resolutions), base.family.size)
    if any(side < grid or side % grid for side in chosen):
        raise ConfigError(
            f"--size: expected multiples of {grid} pixels, found {chosen[0]}x{chosen[1]}."
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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"header 'turbo.config': the guidance in it cannot be read ({error}); export the "
                "LoRA again, or take it from its run folder."
            ) from error
    return base.family.guidance


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
    words = [base.family.negative, *wanted]
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
        free_memory()  # of an earlier pipeline
        self.base, self.texts, self.device = base, texts, device
        transformer = load_transformer(base.path, base.dtype, quantize, loras=base.loras)
        transformer.requires_grad_(False)
        if prepare:
            prepare(transformer)
        self._role = {name: f"lora_{i}" for i, name in enumerate(loras)}  # PEFT allows no dots
        for name, lora in loras.items():
            attach(transformer, self._role[name], lora)
        transformer.to(device).eval()
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
        sigmas = self.base.family.sigmas(self.base.folder, steps, size)
        return self._images(sample_teacher(self.roles, sigmas, noise, text))

    def _inputs(
        self, prompts: Sequence[str], seeds: Sequence[int], size: Size
    ) -> tuple[Tensor, Text]:
        noise = noise_of_seeds(seeds, self.roles.latent_shape(size)).to(self.device)
        return noise, as_text([self.texts[prompt] for prompt in prompts]).to(self.device)

    def _images(self, latents: Tensor) -> Tensor:
        """As many at a time as make one large image, whose decoder takes gigabytes.

        Raises RuntimeError for latents that would be black pictures.
        """
        if not is_finite(latents):
            raise RuntimeError(
                "the sampled latents have NaN or infinite numbers and would be black pictures. The "
                f"LoRA's numbers are finite, so look at the base ({self.base.path}): its weights "
                f"may be damaged, or too large for {self.base.dtype}."
            )
        vae, (side, _) = self.base.family.vae, self.base.family.sizes[0]
        batch_size = max(1, side**2 // (latents[0, 0].numel() * vae.pixels**2))
        images = torch.cat([vae.decode(self.vae, x) for x in latents.float().split(batch_size)])
        return from_unit(images).cpu()


def scaled(lora: NormalisedLora, strength: float) -> NormalisedLora:
    """The LoRA at a strength."""
    modules = {n: replace(m, alpha=m.alpha * strength) for n, m in lora.modules.items()}
    return replace(lora, modules=modules)


@torch.no_grad()
def attach(transformer: nn.Module, role: str, lora: NormalisedLora) -> None:
    """Puts a LoRA beside the weights as PEFT adapter `role`, its weights in float32 as in training.

    The scale is multiplied into lora_B, so ranks may differ. Raises LoraFormatError where it does
    not fit.
    """
    check_fit(transformer, lora)
    ranks = {re.escape(name): module.rank for name, module in lora.modules.items()}
    config = lora_config(
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
