"""One frozen base, several roles: teacher = base alone, student and fake score = LoRA adapters on
it, of a rank and alpha each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from peft.tuners.lora import LoraLayer

from ..config import AdapterSection, GuidanceSection
from .family import family_of_transformer
from .mixed_precision import lora_config
from .sizes import Size
from .text import Text

TEACHER, STUDENT, FAKE = "teacher", "student", "fake"


class Roles:
    """Holds the base and says which adapter speaks.

    Adapter weights are float32 whatever the base's precision, in which they are multiplied
    (mixed_precision.py), and drawn from `seed`. All adapters have one scale (alpha / rank); the
    fake score's may have another rank.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        adapter: AdapterSection,
        guidance: GuidanceSection,
        negative: Text,
        seed: int,
        adapters: tuple[str, ...] = (STUDENT,),
    ) -> None:
        self.transformer = transformer.requires_grad_(False)
        self.family = family_of_transformer(transformer)
        self.guidance = guidance
        self.negative = negative
        self.alpha = float(adapter.alpha or adapter.rank)
        self.scale = self.alpha / adapter.rank
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are meant
            torch.manual_seed(seed)
            for name in adapters:
                rank = adapter.rank if name != FAKE else adapter.fake_rank or adapter.rank
                config = lora_config(
                    r=rank,
                    lora_alpha=self.scale * rank,
                    target_modules=self.family.targets(adapter.modulation),
                    init_lora_weights=True,
                )
                transformer.add_adapter(config, adapter_name=name)
        self._layers = [m for m in transformer.modules() if isinstance(m, LoraLayer)]
        for name in adapters:
            for parameter in self.parameters(name):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        self._role = TEACHER
        self._set(TEACHER)

    @property
    def adapters(self) -> list[str]:
        return list(self._layers[0].lora_A)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return self.family.precision(self.transformer)

    @property
    def device(self) -> torch.device:
        return self.parameters(self.adapters[0])[0].device

    @property
    def width(self) -> int:
        """Channels of the base's hidden states."""
        return self.family.width(self.transformer)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """[C, h, w] of an image of `size` (width, height in pixels)."""
        return self.family.latent_shape(self.transformer, size)

    def tokens(self, latents: torch.Tensor) -> int:
        """Image tokens of each of these latents [B, C, h, w]."""
        return self.family.tokens_of_latents(*latents.shape[-2:])

    def _set(self, role: str) -> None:
        # PEFT's own switches also flip requires_grad; here every adapter stays trainable and only
        # its use changes.
        for layer in self._layers:
            layer._disable_adapters = role == TEACHER
            if role != TEACHER:
                layer._active_adapter = [role]
        self._role = role

    @contextmanager
    def use_role(self, role: str) -> Iterator[ModelMixin]:
        """The transformer in `role`. A backward pass needs its forward's role too, for checkpointed
        blocks run again.
        """
        before = self._role
        self._set(role)
        try:
            yield self.transformer
        finally:
            self._set(before)

    def named_parameters(self, role: str) -> dict[str, torch.nn.Parameter]:
        """LoRA weights of one adapter by PEFT name."""
        return {
            name: parameter
            for name, parameter in self.transformer.named_parameters()
            if ".lora_" in name and f".{role}." in name
        }

    def parameters(self, role: str) -> list[torch.nn.Parameter]:
        return list(self.named_parameters(role).values())

    def velocity(self, role: str, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        """v(x_t, t | text) of one role, without guidance.  [B, C, h, w], [B] -> [B, C, h, w]"""
        with self.use_role(role) as transformer:
            return self.family.velocity(transformer, x_t, t, text)

    @torch.no_grad()
    def teacher(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, scale: float | None = None
    ) -> torch.Tensor:
        """The teacher's velocity under guidance `scale`; None: that of the recipe."""
        return self.teacher_pair(x_t, t, text, scale)[1]

    @torch.no_grad()
    def teacher_pair(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, scale: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's conditional and guided velocity, for the price of the guided one."""
        scale = self.guidance.scale if scale is None else scale
        return self.velocity_pair(TEACHER, x_t, t, text, scale, self.guidance.rescale)

    def velocity_pair(
        self,
        role: str,
        x_t: torch.Tensor,
        t: torch.Tensor,
        text: Text,
        scale: float,
        rescale: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditional and guided velocity of any role, from the one batch that guidance takes."""
        with self.use_role(role) as transformer:
            return self.family.velocity_pair(
                transformer, x_t, t, text, self.negative, scale, rescale
            )

    def teacher_features(
        self, x_t: torch.Tensor, t: torch.Tensor, text: Text, depths: tuple[float, ...]
    ) -> list[torch.Tensor]:
        """Hidden states of the bare base after shares `depths` of its blocks.  # [B, D, h/2, w/2]

        Gradients reach x_t; take them inside `use_role(TEACHER)`.
        """
        with self.use_role(TEACHER) as transformer:
            return self.family.hidden_maps(transformer, x_t, t, text, self.blocks_at(depths))

    def blocks_at(self, depths: tuple[float, ...]) -> list[int]:
        """Blocks of the base after shares `depths` of all, each once."""
        count = len(self.family.blocks_of(self.transformer))
        return sorted({max(1, round(depth * count)) - 1 for depth in depths})

    @torch.no_grad()
    def copy_adapter(self, source: str, target: str) -> None:
        """Gives `target` the function of `source`. A larger rank keeps its own lora_A rows beyond,
        with lora_B columns of zero.

        Raises ValueError if the target's rank is smaller.
        """
        for a, b in self._pairs(source, target):
            if any(m > n for m, n in zip(a.shape, b.shape, strict=True)):
                raise ValueError(
                    f"adapter.fake_rank: expected at least adapter.rank to start from the student "
                    f"(found {min(b.shape)} and {min(a.shape)})."
                )
        for a, b in self._pairs(source, target):
            rows, columns = a.shape
            b[:, columns:] = 0  # lora_B [out, rank] grows in columns
            b[:rows, :columns] = a

    @torch.no_grad()
    def reset_adapter(self, role: str) -> None:
        """Makes the adapter do nothing: lora_B = 0."""
        for name, parameter in self.named_parameters(role).items():
            if ".lora_B." in name:
                parameter.zero_()

    @torch.no_grad()
    def blend_adapter(self, source: str, target: str, keep: float) -> None:
        """target <- keep target + (1 - keep) source, weight by weight (same ranks)."""
        for a, b in self._pairs(source, target):
            b.lerp_(a, 1 - keep)

    def _pairs(self, source: str, target: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.parameters(source), self.parameters(target), strict=True))
