"""The same job three ways: A diffusers, B core's nodes as its 2-step template wires them, C ours.

An arm draws `count` images of one prompt, one after another, to PNG files on disk, and keeps the
time of every stage and of the moment when the first file is complete. All have their models in
memory: that is how a session runs from its second prompt on.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .measure import FIRST, Clock
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


def arms_of(world: World) -> dict[str, Arm]:
    """As shipped."""
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
            clock.moments.setdefault(FIRST, clock.now)

    def modules(self) -> list[torch.nn.Module]:
        """What it needs in memory."""
        return [self.pipeline.transformer, self.pipeline.text_encoder, self.pipeline.vae]

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
            clock.moments.setdefault(FIRST, clock.now)

    def modules(self) -> list[torch.nn.Module]:
        return modules_of(self.world, self.model)

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

    def __init__(
        self,
        world: World,
        attention: str = "auto",
        compiled: bool = False,
        own_model: Any = None,  # in place of the one that the arms share
    ) -> None:
        core = world.core
        self.world, self.sampling = world, core.pack("nodes.sampling")
        self.saving, self.decode = core.pack("nodes.save"), core.pack("nodes.decode").decode
        self.prompts, self.generate = core.pack("nodes.prompt"), core.pack("nodes.images").generate
        self.cache = core.pack("nodes.prompt_cache").PromptCache(
            Path(tempfile.mkdtemp(dir=core.folder))  # empty, and of this arm alone
        )
        self.compiled = compiled
        model = with_spec(world) if own_model is None else own_model
        self.model, self.report = core.pack("nodes.accelerate").accelerate(
            model, attention, compiled
        )

    @torch.inference_mode()
    def __call__(self, job: Job, clock: Clock) -> None:
        with clock(ENCODE):
            positive = self.encode(job.prompt)
        saving = self.saving.Saving("c")
        for index in range(job.count):
            with clock(SAMPLE):
                latent = self.sample(positive, job, index)
            with clock(DECODE):
                images = self.decode(self.world.vae, latent["samples"])
            with clock(SAVE):
                shown = self.saving.save_images(images, saving)
            if index == 0:
                first = self.when_complete(shown, clock)
        with clock(SAVE):  # all files on disk, as in the other arms
            self.saving.WRITER.flush()
        clock.moments[FIRST] = first.result()

    def when_complete(self, shown: list[dict[str, str]], clock: Clock) -> Future[float]:
        """The moment when the background writer has finished the first of these files."""
        moment: Future[float] = Future()
        path = self.world.core.models("output") / shown[0]["subfolder"] / shown[0]["filename"]
        pending = self.saving.WRITER.pending(path)
        if pending is None:
            moment.set_result(clock.now)
        else:
            pending.add_done_callback(lambda _: moment.set_result(clock.now))
        return moment

    @property
    def attention(self) -> str:
        """The kernel that its forwards have had so far."""
        from comfy.ldm.modules.attention import optimized_attention

        core = f"core's own, {optimized_attention.__name__.removeprefix('attention_')}"
        kernel = self.kernel
        if kernel is None:
            return core
        if kernel.failed is not None:
            return f"{core}, for {kernel.kernel.name} {kernel.failed}"
        return str(kernel.kernel.name) if kernel.calls else f"none yet, then {kernel.kernel.name}"

    @property
    def kernel(self) -> Any:
        """Turbo Accelerate's guarded kernel on the MODEL; None where that is core's attention."""
        return self.model.model_options.get("transformer_options", {}).get(
            "optimized_attention_override"
        )

    def modules(self) -> list[torch.nn.Module]:
        return modules_of(self.world, self.model)

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
        moments: list[Future[float]] = []

        def deliver(number: int, image: torch.Tensor) -> None:
            shown = self.saving.save_images(image, saving, first_number=number)
            if number == 0:
                moments.append(self.when_complete(shown, clock))

        with clock(ALL):
            latent = empty_latent(job, job.count)
            plan = self.sampling.make_plan(self.model, latent)
            self.generate(self.model, positive, self.world.vae, latent, job.seed, plan, deliver)
            self.saving.WRITER.flush()
        clock.moments[FIRST] = moments[0].result()


def with_spec(world: World) -> Any:
    """The MODEL that the arms share, with the spec that Turbo LoRA Loader would leave on it."""
    attached, spec = (
        world.core.pack("nodes.spec_attachment"),
        world.core.pack("distill.contract.spec"),
    )
    model = world.patched.clone()
    attached.attach(model, attached.Attached(spec.TurboSpec(SIGMAS), "benchmark", world.lora.name))
    return model


def modules_of(world: World, model: Any) -> list[torch.nn.Module]:
    """What an arm of ComfyUI's needs in memory. Our decoder is a copy of the VAE's."""
    vae = world.vae.first_stage_model
    return [model.model.diffusion_model, world.clip.cond_stage_model, vae]


def weight_bytes(arm: Arm) -> int:
    """As stored; state_dict has 8-bit layers as they are, and their scales."""
    return sum(tensor.nbytes for module in arm.modules() for tensor in module.state_dict().values())


def empty_latent(job: Job, count: int = 1) -> dict[str, Any]:
    """What EmptySD3LatentImage gives."""
    from comfy_extras.nodes_sd3 import EmptySD3LatentImage

    return EmptySD3LatentImage.execute(job.width, job.height, count)[0]


Arm = DiffusersArm | CoreArm | TurboArm
