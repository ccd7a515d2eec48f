"""The same job three ways: A diffusers, B core's nodes as its 2-step template wires them, C ours.

An arm draws `count` images of one prompt, one after another, to PNG files on disk, and keeps the
time of every stage. All three have their models in memory: that is how a session runs from its
second prompt on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import Clock
from .world import SHIFT, SIGMAS, World

ENCODE, SAMPLE, DECODE, SAVE = "encode", "sample", "decode", "save"
ALL = "sample, decode, save"  # one over another, so they cannot be told apart


@dataclass(frozen=True)
class Job:
    prompt: str
    width: int
    height: int
    count: int = 1
    seed: int = 0


Arm = Callable[[Job, Clock], None]


def arms_of(world: World) -> dict[str, Arm]:
    return {
        "A diffusers": DiffusersArm(world),
        "B core nodes": CoreArm(world),
        "C turbo distill": TurboArm(world),
        "C with Turbo Images": TurboImagesArm(world),
    }


class DiffusersArm:
    """QwenImagePipeline with the LoRA fused, its own steps taken apart for the clock."""

    def __init__(self, world: World) -> None:
        self.pipeline = world.pipeline
        self.output = world.core.models("output")

    @torch.no_grad()
    def __call__(self, job: Job, clock: Clock) -> None:
        pipe = self.pipeline
        with clock(ENCODE):
            embeds, mask = pipe.encode_prompt(job.prompt, device=pipe.transformer.device)
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask
        for index in range(job.count):
            with clock(SAMPLE):
                latents = pipe(
                    prompt_embeds=embeds,
                    prompt_embeds_mask=mask.to(embeds.device),
                    sigmas=list(SIGMAS[:-1]),
                    true_cfg_scale=1.0,
                    height=job.height,
                    width=job.width,
                    generator=torch.Generator().manual_seed(job.seed + index),
                    output_type="latent",
                ).images
            with clock(DECODE):
                (image,) = self._decode(latents, job)
            with clock(SAVE):
                image.save(self.output / f"a_{job.seed + index:05}.png")

    def _decode(self, latents: torch.Tensor, job: Job) -> list[Any]:
        """The end of QwenImagePipeline.__call__."""
        vae = self.pipeline.vae
        latents = self.pipeline._unpack_latents(
            latents, job.height, job.width, self.pipeline.vae_scale_factor
        ).to(vae.dtype)
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        std = torch.tensor(vae.config.latents_std).view(shape).to(latents)
        pixels = vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")


class CoreArm:
    """Core's nodes and widgets of the template `image_qwen_image_2512_with_2steps_lora`."""

    def __init__(self, world: World) -> None:
        from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

        self.world = world
        self.model = ModelSamplingAuraFlow().patch_aura(world.patched, SHIFT)[0]

    @torch.inference_mode()
    def __call__(self, job: Job, clock: Clock) -> None:
        import nodes

        with clock(ENCODE):
            positive = nodes.CLIPTextEncode().encode(self.world.clip, job.prompt)[0]
        for index in range(job.count):
            with clock(SAMPLE):
                latent = self.sample(positive, job, index)
            with clock(DECODE):
                images = nodes.VAEDecode().decode(self.world.vae, latent)[0]
            with clock(SAVE):
                nodes.SaveImage().save_images(images, "b")

    def sample(self, positive: list[Any], job: Job, index: int) -> dict[str, Any]:
        import nodes

        negative = nodes.ConditioningZeroOut().zero_out(positive)[0]
        return nodes.KSampler().sample(
            self.model,
            job.seed + index,
            len(SIGMAS) - 1,
            1.0,
            "euler",
            "simple",
            positive,
            negative,
            empty_latent(job),
        )[0]


class TurboArm:
    """Turbo Prompt, Accelerate, Sampler, VAE Decode and Save Image on the same patched weights.

    Turbo LoRA Loader merges as core's does (`loading.py` measures both); taking core's patched
    MODEL here leaves one copy of the weights for all arms.
    """

    def __init__(self, world: World, attention: str = "auto", compiled: bool = False) -> None:
        core = world.core
        self.world, self.sampling = world, core.pack("nodes.sampling")
        self.saving, self.decode = core.pack("nodes.save"), core.pack("nodes.decode").decode
        self.prompts, self.paint = core.pack("nodes.prompt"), core.pack("nodes.images").paint
        self.cache = core.pack("nodes.prompt_cache").PromptCache(
            Path(tempfile.mkdtemp(dir=core.folder))  # empty, and of this arm alone
        )
        attached, spec = core.pack("nodes.attached"), core.pack("distill.contract.spec")
        model, self.report = core.pack("nodes.accelerate").accelerate(
            world.patched, attention, compiled
        )
        attached.attach(
            model, attached.Attached(spec.TurboSpec(SIGMAS), "benchmark", world.lora.name)
        )
        self.model = model

    @torch.inference_mode()
    def __call__(self, job: Job, clock: Clock) -> None:
        with clock(ENCODE):
            positive = self.encode(job.prompt)
        saving = self.saving.Saving("c")
        for index in range(job.count):
            with clock(SAMPLE):
                latent = empty_latent(job)
                plan = self.sampling.make_plan(self.model, latent)
                latent = self.sampling.sample(self.model, positive, latent, job.seed + index, plan)
            with clock(DECODE):
                images = self.decode(self.world.vae, latent["samples"])
            with clock(SAVE):
                self.saving.save_images(images, saving)
        with clock(SAVE):  # all files on disk, as in the other arms
            self.saving.WRITER.flush()

    def encode(self, text: str) -> list[Any]:
        """As Turbo Prompt does, with a cache of this benchmark's own."""
        key = self.prompts.prompt_key(text, "random encoder of this benchmark")
        found = self.cache.load(key)
        if found is None:
            found = self.prompts.encode(self.world.clip, text)
            self.cache.store(key, found)
        return self.prompts.to_device(found)

    def sample(self, positive: list[Any], job: Job, index: int) -> dict[str, Any]:
        latent = empty_latent(job)
        plan = self.sampling.make_plan(self.model, latent)
        return self.sampling.sample(self.model, positive, latent, job.seed + index, plan)


class TurboImagesArm(TurboArm):
    """Turbo Images in place of the last three nodes: a file is made while the next image is drawn.

    Its noises are those of a batch with one seed.
    """

    @torch.inference_mode()
    def __call__(self, job: Job, clock: Clock) -> None:
        with clock(ENCODE):
            positive = self.encode(job.prompt)
        saving = self.saving.Saving("d")

        def deliver(number: int, image: torch.Tensor) -> None:
            self.saving.save_images(image, saving, first_number=number)

        with clock(ALL):
            latent = empty_latent(job, job.count)
            plan = self.sampling.make_plan(self.model, latent)
            self.paint(self.model, positive, self.world.vae, latent, job.seed, plan, deliver)
            self.saving.WRITER.flush()


def empty_latent(job: Job, count: int = 1) -> dict[str, Any]:
    """What EmptySD3LatentImage gives."""
    from comfy_extras.nodes_sd3 import EmptySD3LatentImage

    return EmptySD3LatentImage.execute(job.width, job.height, count)[0]
