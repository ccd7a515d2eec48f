"""A latent of another kind is told by what it is, in every node that takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def audio() -> dict[str, Any]:
    from comfy_extras.nodes_audio import EmptyLatentAudio

    return EmptyLatentAudio.execute(10.0, 1)[0]


def music() -> dict[str, Any]:
    from comfy_extras.nodes_ace import EmptyAceStepLatentAudio

    return EmptyAceStepLatentAudio.execute(10.0, 1)[0]


def video() -> dict[str, Any]:
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo

    return EmptyHunyuanLatentVideo.execute(64, 64, 25, 1)[0]


def video_and_audio() -> dict[str, Any]:
    from comfy.nested_tensor import NestedTensor

    return {"samples": NestedTensor([torch.zeros(1, 128, 4, 2, 2), torch.zeros(1, 8, 16, 8)])}


def sd15() -> dict[str, Any]:
    return {"samples": torch.ones(1, 4, 8, 8)}


KINDS = {
    "audio": (audio, r"an audio latent \[1, 64, \d+\]"),
    "music": (music, r"an audio latent \[1, 8, 16, \d+\]"),
    "video": (video, r"a video latent of 7 frames \[1, 16, 7, 8, 8\]"),
    "video and audio": (video_and_audio, "a latent of video and audio in one"),
    "another VAE's": (sd15, r"4 channels \[1, 4, 8, 8\], and QwenImage takes 16"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sampler(kind: str, pack: Any, turbo_model: Any, prompt: Any, run_node: Any) -> None:
    make, message = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        run_node(
            pack("nodes.sampling").TurboSampler,
            model=turbo_model(),
            positive=prompt,
            latent_image=make(),
            noise_seed=1,
            start_step=0,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_images(kind: str, pack: Any, turbo_model: Any, prompt: Any, run_node: Any) -> None:
    make, message = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        run_node(
            pack("nodes.images").TurboImages,
            model=turbo_model(),
            positive=prompt,
            vae=None,
            width=64,
            height=64,
            batch_size=1,
            noise_seed=1,
            filename_prefix="x",
            latent_image=make(),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_compare(kind: str, pack: Any, model: Any, prompt: Any, run_node: Any) -> None:
    make, message = KINDS[kind]
    with pytest.raises(ValueError, match=message):
        run_node(
            pack("nodes.compare").TurboCompare,
            model=model,
            positive=prompt,
            vae=None,
            latent_image=make(),
            noise_seed=1,
            teacher_steps=2,
            teacher_cfg=1.0,
            teacher_shift=0.0,
            cell_size=64,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [(audio, "an audio latent.*VAE Decode Audio"), (music, "an audio latent"), (sd15, "takes 16")],
)
def test_decode(make: Any, message: str, pack: Any, tiny_folder: Any, run_node: Any) -> None:
    vae = pack("nodes.tiny").load_vae(tiny_folder / "vae")
    with pytest.raises(ValueError, match=message):
        run_node(pack("nodes.decode").TurboDecode, samples=make(), vae=vae)


def test_a_layered_model_takes_its_layers_for_frames(
    pack: Any, turbo_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = turbo_model()
    embedding = model.model.diffusion_model.time_text_embed
    monkeypatch.setattr(embedding, "use_additional_t_cond", True)
    pack("nodes.latents").check_latent("Turbo Sampler", model, video())
