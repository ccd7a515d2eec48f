"""Turbo Images: samples, decodes and saves images one by one; each is shown when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.sample
import torch
from comfy_api.latest import io
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from torch import Tensor

import nodes as core

from .decode import decode
from .sampling import SamplingPlan, make_plan, sample, seed_input
from .save import (
    COMPRESS_LEVEL,
    HIDDEN,
    Saving,
    failures_of,
    finish,
    prefix_input,
    save_images,
    saving_inputs,
)
from .tokens import prefix_warnings
from .ui import CATEGORY, FrontEnd, show_on_node, with_warnings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NODE_ID = "TurboDistillImages"
DEFAULT_SIZE = 1328  # Qwen-Image's own

Shown = list[dict[str, str]]


def each(model: ModelPatcher, latent: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The latents of a batch one by one, with the noise and the mask that core gives each of them
    in the whole batch.
    """
    options = dict(latent)
    ratios = [options.pop(f"downscale_ratio_{kind}", None) for kind in ("spacial", "temporal")]
    samples = comfy.sample.fix_empty_latent_channels(model, options["samples"], *ratios)
    indices = options.get("batch_index") or range(len(samples))
    mask = options.get("noise_mask")
    # for latents with a time axis core takes several masks for those of several frames
    mask_each = mask is not None and (samples.ndim == 4 or mask.ndim == 5)
    for k, index in zip(range(len(samples)), indices, strict=True):
        one = {**options, "samples": samples[k : k + 1], "batch_index": [index]}
        if mask_each:
            one["noise_mask"] = mask[k % len(mask)][None]
        yield one


def generate(
    model: ModelPatcher,
    positive: list[Any],
    vae: VAE,
    latent: dict[str, Any],
    seed: int,
    plan: SamplingPlan,
    deliver: Callable[[int, Tensor], None],
) -> Tensor:
    """All images, [B, H, W, C] in [0, 1].

    deliver: called in a thread with number and image, while the next one is sampled. What was
    finished is delivered even where this is interrupted or fails.
    """
    images: list[Tensor] = []
    deliveries: list[Future[None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="turbo-distill-images") as thread:
        for one in each(model, latent):
            comfy.model_management.throw_exception_if_processing_interrupted()
            sampled = sample(model, positive, one, seed, plan)
            image = decode(vae, sampled["samples"])
            deliveries.append(thread.submit(deliver, len(images), image))
            images.append(image)
            for delivery in deliveries:
                if delivery.done():
                    delivery.result()  # raises: a full disk stops the batch now, not at its end
    for delivery in deliveries:
        delivery.result()
    return torch.cat(images)


class TurboImages(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE_ID,
            display_name="Turbo Images",
            category=CATEGORY,
            description="Several images one after another: each is sampled as Turbo Sampler does "
            "it, decoded, shown and saved while the next one is sampled. The same images as a "
            "batch through Turbo Sampler, VAE Decode and Save Image, the first of them much "
            "sooner, in the memory of one.",
            search_aliases=[
                "turbo batch",
                "generate images",
                "image by image",
                "all in one",
                "sample decode save",
                "sequential batch",
                "low memory batch",
            ],
            inputs=_inputs(),
            outputs=[io.Image.Output(display_name="images", tooltip="All images as one batch.")],
            hidden=HIDDEN,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> int:
        return failures_of(cls.hidden.unique_id)

    @classmethod
    def execute(
        cls,
        model,
        positive,
        vae,
        width,
        height,
        batch_size,
        noise_seed,
        filename_prefix,
        compress_level=COMPRESS_LEVEL,
        background=True,
        latent_image=None,
    ) -> io.NodeOutput:
        latent = latent_image or EmptySD3LatentImage.execute(width, height, batch_size)[0]
        plan = make_plan(model, latent, positive=positive)
        vae.throw_exception_if_invalid()
        warnings = prefix_warnings(filename_prefix)
        text = with_warnings([plan.to_text()], warnings)
        report = show_on_node(text, cls.hidden.unique_id, [*plan.warnings, *warnings])
        front_end = FrontEnd.of(cls.hidden, NODE_ID)
        saving = Saving.of(cls.hidden, filename_prefix, compress_level, background, front_end)
        shown: Shown = []

        def deliver(number: int, image: Tensor) -> None:
            shown.extend(save_images(image, saving, first_number=number))
            if front_end is not None:
                front_end.show_images(list(shown))

        images = generate(model, positive, vae, latent, noise_seed, plan, deliver)
        finish(background, saving)
        return io.NodeOutput(images, ui={"images": shown, **report})


def _inputs() -> list[io.Input]:
    size = {"min": 16, "max": core.MAX_RESOLUTION, "step": 16}
    return [
        io.Model.Input("model", tooltip="A MODEL from Turbo LoRA Loader."),
        io.Conditioning.Input("positive", tooltip="The prompt, from Turbo Prompt for example."),
        io.Vae.Input("vae", tooltip="Decodes each image as Turbo VAE Decode does."),
        io.Int.Input("width", default=DEFAULT_SIZE, **size, tooltip="Width in pixels."),
        io.Int.Input("height", default=DEFAULT_SIZE, **size, tooltip="Height in pixels."),
        io.Int.Input(
            "batch_size",
            default=4,
            min=1,
            max=4096,
            tooltip="How many images. Each has the noise that it has in a batch of this seed.",
        ),
        seed_input("All noise is drawn on the CPU from this seed, as in Turbo Sampler."),
        prefix_input(),
        *saving_inputs(),
        io.Latent.Input(
            "latent_image",
            optional=True,
            tooltip="Instead of width, height and batch_size: an empty latent of another kind, or "
            "one with a noise mask for inpainting.",
        ),
    ]
