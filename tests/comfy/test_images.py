"""Turbo Images: the images of a batch, one by one, delivered while the next one is sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill.utils.comfyui import ComfyServer

HEIGHT, WIDTH, COUNT, SEED = 64, 48, 3, 5


@pytest.fixture(scope="session")
def vae(pack: Any, tiny_folder: Path) -> Any:
    return pack("nodes.tiny").load_vae(tiny_folder / "vae")


@pytest.fixture
def generate(pack: Any, vae: Any, prompt: Any) -> Callable[..., Tensor]:
    """(model, latent, deliver) -> images."""
    images, sampling = pack("nodes.images"), pack("nodes.sampling")

    def run(model: Any, latent: dict[str, Any], deliver: Any = lambda *_: None) -> Tensor:
        plan = sampling.make_plan(model, latent)
        return images.generate(model, prompt, vae, latent, SEED, plan, deliver)

    return run


@pytest.fixture
def as_batch(vae: Any, prompt: Any, sample: Any) -> Callable[..., Tensor]:
    """Turbo Sampler and core's VAE Decode on the whole batch."""

    def run(model: Any, latent: dict[str, Any]) -> Tensor:
        from nodes import VAEDecode

        sampled, _ = sample(model, prompt, latent, SEED)
        return VAEDecode().decode(vae, sampled)[0]

    return run


def empty(count: int = COUNT) -> dict[str, Any]:
    return {"samples": torch.zeros(count, 16, HEIGHT // 8, WIDTH // 8)}


# ---------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_they_are_those_of_the_batch(
    turbo_model: Any, generate: Any, as_batch: Any, sampler: str
) -> None:
    model = turbo_model(sampler=sampler)
    expected = as_batch(model, empty())
    found = generate(model, empty())
    assert found.shape == (COUNT, HEIGHT, WIDTH, 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_a_latent_with_its_own_batch_numbers_and_masks(
    turbo_model: Any, generate: Any, as_batch: Any
) -> None:
    model = turbo_model()
    generator = torch.Generator().manual_seed(1)
    latent = {
        "samples": torch.randn(2, 16, 1, HEIGHT // 8, WIDTH // 8, generator=generator),
        "batch_index": [4, 1],
        "noise_mask": torch.rand(2, HEIGHT, WIDTH, generator=generator).round(),
    }
    expected = as_batch(model, latent)
    torch.testing.assert_close(generate(model, latent), expected, rtol=0, atol=1e-4)
    own_masks = {**latent, "noise_mask": latent["noise_mask"][:, None, None]}
    expected = as_batch(model, own_masks)
    torch.testing.assert_close(generate(model, own_masks), expected, rtol=0, atol=1e-4)


def test_two_forwards_of_one_image_each(
    turbo_model: Any, generate: Any, count_forwards: Any
) -> None:
    model = turbo_model()
    batches = count_forwards(model)
    generate(model, empty())
    assert batches == [1] * (2 * COUNT)


# -------------------------------------------------------------------------------------- one by one


def test_an_image_is_delivered_while_the_next_is_sampled(
    turbo_model: Any, generate: Any, count_forwards: Any
) -> None:
    """The first delivery does not end before the second image is being sampled."""
    model = turbo_model()
    batches = count_forwards(model)
    seen: list[tuple[int, int]] = []

    def deliver(number: int, image: Tensor) -> None:
        assert image.shape == (1, HEIGHT, WIDTH, 3)
        for _ in range(2000):
            if number == COUNT - 1 or len(batches) > 2 * (number + 1):
                break
            threading.Event().wait(0.01)
        seen.append((number, len(batches)))

    generate(model, empty(), deliver)
    assert [number for number, _ in seen] == [0, 1, 2]
    assert seen[0][1] > 2
    assert seen[1][1] > 4


def test_interrupting_keeps_what_is_finished(
    turbo_model: Any, generate: Any, count_forwards: Any
) -> None:
    import comfy.model_management as management

    model = turbo_model()
    batches = count_forwards(model)
    finished = []

    def deliver(number: int, image: Tensor) -> None:
        finished.append(number)
        management.interrupt_current_processing()

    with pytest.raises(management.InterruptProcessingException):
        generate(model, empty(20), deliver)
    assert finished == list(range(len(finished)))
    assert len(finished) >= 1
    assert len(batches) < 40
    management.throw_exception_if_processing_interrupted()  # nothing is left for the next prompt


def test_a_full_disk_stops_the_batch(turbo_model: Any, generate: Any, count_forwards: Any) -> None:
    model = turbo_model()
    batches = count_forwards(model)

    def deliver(number: int, image: Tensor) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        generate(model, empty(30), deliver)
    assert len(batches) < 60


# --------------------------------------------------------------------------------------- the node


def test_the_node(
    pack: Any, turbo_model: Any, vae: Any, prompt: Any, output: Path, run_node: Any, as_batch: Any
) -> None:
    model = turbo_model()
    arguments = {
        **{"model": model, "positive": prompt, "vae": vae, "width": WIDTH, "height": HEIGHT},
        **{"batch_size": 2, "noise_seed": SEED, "filename_prefix": "i/n_%batch_num%"},
    }
    (images,) = run_node(pack("nodes.images").TurboImages, **arguments)
    torch.testing.assert_close(images, as_batch(model, empty(2)), rtol=0, atol=1e-4)
    paths = sorted((output / "i").iterdir())
    assert [path.name for path in paths] == ["n_0_00001_.png", "n_1_00002_.png"]
    for path, image in zip(paths, images, strict=True):
        with Image.open(path) as saved:
            assert np.array_equal(np.asarray(saved), (image * 255).to(torch.uint8).numpy())
    latent = empty(1)
    (images,) = run_node(pack("nodes.images").TurboImages, **arguments, latent_image=latent)
    assert len(images) == 1


def test_a_model_without_a_spec(
    pack: Any, model: Any, vae: Any, prompt: Any, output: Path, run_node: Any
) -> None:
    arguments = {
        **{"model": model, "positive": prompt, "vae": vae, "width": WIDTH, "height": HEIGHT},
        **{"batch_size": 2, "noise_seed": SEED, "filename_prefix": "x"},
    }
    with pytest.raises(ValueError, match="Put a Turbo LoRA Loader"):
        run_node(pack("nodes.images").TurboImages, **arguments)


def test_in_a_server(server: ComfyServer, listen: Any, tiny_prompt: Any) -> None:
    """The tiny model's images: those of the ordinary graph, and shown one after another."""
    from distill.contract.tiny import TINY_DIR

    assert TINY_DIR.is_dir()
    prompt = tiny_prompt(count=3)
    loader_and_text = {number: prompt[number] for number in ("1", "2")}
    images = {
        "class_type": "TurboDistillImages",
        "inputs": {
            "model": ["1", 0],
            "positive": ["2", 0],
            "vae": ["1", 1],
            "noise_seed": 1,
            "filename_prefix": "one",
            **prompt["3"]["inputs"],
        },
    }
    messages = listen(server, {**loader_and_text, "i": images})
    outputs = [m["output"] for m in messages["executed"] if "images" in m["output"]]
    shown = [[image["filename"] for image in output["images"]] for output in outputs]
    names = [f"one_0000{number}_.png" for number in (1, 2, 3)]
    assert shown == [names[:1], names[:2], names, names], "each at once, then all by core"
    history = {"outputs": {"i": outputs[-1]}}
    expected = pixels(server.images(server.queue(prompt)))
    found = pixels(server.images(history))
    assert found.shape == (3, 64, 64, 3)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1, "255 x, fraction dropped"


def pixels(files: list[bytes]) -> np.ndarray[Any, Any]:
    import io

    return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in files])
