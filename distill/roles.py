"""One frozen base, several roles: teacher = base alone, student and fake score = LoRA adapters on
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from . import models
from .config import AdapterSection, GuidanceSection
from .models import Text

TEACHER, STUDENT, FAKE = "teacher", "student", "fake"


class Roles:
    """Holds the base and says which adapter speaks.

    Adapter weights are float32 whatever the base's precision, and drawn from `seed`.
    """

    def __init__(
        self,
        transformer: QwenImageTransformer2DModel,
        adapter: AdapterSection,
        guidance: GuidanceSection,
        negative: Text,
        seed: int,
        adapters: tuple[str, ...] = (STUDENT,),
    ) -> None:
        self.transformer = transformer.requires_grad_(False)
        self.guidance = guidance
        self.negative = negative
        self.alpha = float(adapter.alpha or adapter.rank)
        self.scale = self.alpha / adapter.rank
        config = LoraConfig(
            r=adapter.rank,
            lora_alpha=self.alpha,
            target_modules=adapter.targets,
            init_lora_weights=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for name in adapters:
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

    def _set(self, role: str) -> None:
        # PEFT's own switches also flip requires_grad; here every adapter stays trainable and only
        # its use changes.
        for layer in self._layers:
            layer._disable_adapters = role == TEACHER
            if role != TEACHER:
                layer._active_adapter = [role]
        self._role = role

    @contextmanager
    def playing(self, role: str) -> Iterator[QwenImageTransformer2DModel]:
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
        with self.playing(role) as transformer:
            return models.velocity(transformer, x_t, t, text)

    @torch.no_grad()
    def teacher(self, x_t: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        """The teacher's guided velocity."""
        with self.playing(TEACHER) as transformer:
            return models.guided_velocity(
                transformer, x_t, t, text, self.negative, self.guidance.scale, self.guidance.rescale
            )
