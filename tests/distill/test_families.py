"""The next model family is one new file: here is one, with other layers, latents, sizes, VAE and
text encoder than Qwen-Image. It goes through `prepare`, `train`, previews, `sample`, `--dry-run`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from PIL import Image
from torch import Tensor, nn

from distill.cli import main
from distill.config import ConfigError
from distill.contract.metadata import read_lora
from distill.contract.schedule import schedule
from distill.contract.spec import TurboSpec
from distill.models import family as registry
from distill.models import flow
from distill.models.family import Family, family_of, family_of_spec
from distill.models.load import load_transformer
from distill.models.text import Text
from distill.models.vae import Autoencoder, Published

PIXELS = 4  # per latent and side
CHANNELS = 3 * PIXELS**2
TEXT_WIDTH = 6


class SketchTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Mixes every place of an image with its prompt: no attention, no patches, one linear layer."""

    @register_to_config
    def __init__(self, channels: int = CHANNELS, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        self.enter = nn.Linear(channels, width)
        self.time = nn.Linear(1, width)
        self.prompt = nn.Linear(TEXT_WIDTH, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(width, width), "level": nn.Linear(1, width)})
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, channels)

    def forward(self, tokens: Tensor, t: Tensor, text: Tensor) -> Tensor:  # [B, places, channels]
        t = t[:, None, None]
        x = self.enter(tokens) + self.time(t) + self.prompt(text.mean(1, keepdim=True))
        for layer in self.layers:
            x = x + F.silu(layer["mix"](x) + layer["level"](t))
        return self.leave(x)


class SketchVAE(ModelMixin, ConfigMixin):
    """Pixels set aside as channels: nothing is lost, nothing is learnt."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # a file has to hold something


class SketchTextEncoder:
    """A prompt's first letters as numbers."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        assert (folder / "text_encoder").is_dir()

    def refuses(self, prompt: str) -> str:
        return "" if prompt.isascii() else "only ASCII is known"

    def cut(self, prompt: str) -> str:
        return ""

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        words = [prompt.split() or [""] for prompt in prompts]
        return [
            torch.tensor(
                [[ord(c) / 128 for c in word.ljust(TEXT_WIDTH)[:TEXT_WIDTH]] for word in w]
            )
            for w in words
        ]


def velocity(transformer: SketchTransformer, x_t: Tensor, t: Tensor, text: Text) -> Tensor:
    tokens = x_t.flatten(2).mT.to(transformer.dtype)
    v = transformer(tokens, t.to(transformer.dtype), text.embeds.to(transformer.dtype))
    return v.mT.reshape(x_t.shape).to(x_t.dtype)


def velocity_pair(
    transformer: SketchTransformer,
    x_t: Tensor,
    t: Tensor,
    text: Text,
    negative: Text,
    scale: float,
    rescale: bool,
) -> tuple[Tensor, Tensor]:
    cond = velocity(transformer, x_t, t, text)
    uncond = velocity(transformer, x_t, t, negative.repeat(len(x_t)))
    return cond, flow.guide(cond, uncond, scale, rescale)


def encode(vae: SketchVAE, images: Tensor) -> tuple[Tensor, Tensor]:
    mean = F.pixel_unshuffle(images, PIXELS)
    return mean, torch.zeros_like(mean)


FAMILY = Family(
    architecture="sketch",
    transformer=f"{__name__}:SketchTransformer",
    pipeline="SketchPipeline",
    hub_ids=("me/sketch",),
    blocks="layers",
    lora_targets=("mix",),
    modulation=("level",),
    width=lambda transformer: transformer.config.width,
    text_width=lambda transformer: transformer.config.channels,
    latent_channels=lambda transformer: transformer.config.channels,
    precision=lambda transformer: transformer.enter.weight.dtype,
    velocity=velocity,
    velocity_pair=velocity_pair,
    hidden_maps=lambda *_: pytest.fail("no discriminator of latents here"),
    vae=Autoencoder(
        kind=f"{__name__}:SketchVAE",
        prepare=lambda vae: vae,
        encode=encode,
        decode=lambda vae, latents: F.pixel_shuffle(latents, PIXELS).clamp(-1, 1),
        decode_with_gradient=lambda vae, latents: F.pixel_shuffle(latents, PIXELS),
        pixels=PIXELS,
        channels=CHANNELS,
        published=Published(("width", 1), 1, 1.0, 1.0),
    ),
    text_encoder=SketchTextEncoder,
    negative="",
    token=PIXELS,
    sizes=((64, 64), (96, 48), (48, 96)),
    size=(64, 64),
    sigmas=lambda folder, steps, size: schedule(steps, shift=1.5),
    text_tokens=3,
    tflops=0.001,
    prompt_score=lambda: Brightness(),
)


class Brightness:
    """How previews of this family are scored."""

    network = nn.Identity()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> float:
        return (images.mean().item() + 1) / 2


@pytest.fixture
def sketch(monkeypatch: pytest.MonkeyPatch) -> Family:
    monkeypatch.setitem(registry.FAMILIES, "sketch", __name__)
    return registry.family("sketch")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model of the family in diffusers layout."""
    torch.manual_seed(0)
    SketchTransformer().save_pretrained(tmp_path / "base" / "transformer")
    SketchVAE().save_pretrained(tmp_path / "base" / "vae")
    SketchVAE().save_pretrained(tmp_path / "base" / "text_encoder")
    return tmp_path / "base"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (100 + 10 * i, 90), (40 * i, 120, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"colour number {i}")
    return folder


def test_the_registry(sketch: Family, base: Path) -> None:
    assert family_of(str(base)) is sketch
    assert family_of_spec(TurboSpec((1.0, 0.0), family="sketch", base="me/base")) is sketch
    assert family_of("me/sketch") is sketch
    (base / "transformer" / "config.json").write_text("[1]")
    assert family_of(str(base)).name == registry.DEFAULT
    with pytest.raises(ConfigError, match=r"config\.json: expected the configuration of a Qwen"):
        load_transformer(str(base), torch.float32)
    assert family_of("Qwen/Qwen-Image-2512").name == "qwen-image"
    assert family_of("tiny").name == "tiny"


def test_a_hub_id_is_known_by_what_is_here_of_it(
    sketch: Family, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finetune of somebody's, after `hf download`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert family_of("you/finetune").name == registry.DEFAULT
    folder = tmp_path / "hub" / "models--you--finetune"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    shutil.copytree(base, folder / "snapshots" / "abc")
    assert family_of("you/finetune") is sketch


def test_it_is_prepared_trained_and_sampled(
    sketch: Family, base: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, recipe, run = tmp_path / "cache", tmp_path / "recipe.yaml", tmp_path / "run"
    values: dict[str, Any] = {
        "run_dir": str(run),
        "model": {"path": str(base), "dtype": "float32", "gradient_checkpointing": False},
        "data": {"cache": str(cache), "images": str(photos), "resolution": 64, "max_upscale": 2},
        "spec": {"sigmas": [1.0, 0.6, 0.0]},
        "adapter": {"rank": 2, "modulation": True},
        "stages": [
            {"method": "pcm", "steps": 1, "batch": 2, "points": 2},
            {"method": "dmd2", "steps": 1, "batch": 2},
        ],
        "preview": {"every": 1, "prompts": 1, "images": 2, "teacher_steps": 2},
    }
    recipe.write_text(json.dumps(values))  # JSON is YAML
    assert main(["prepare", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["train", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 16 * 16 + 3
    assert plan["adapted_layers"] == 4
    assert main(["train", str(recipe)]) == 0

    path = run / "lora" / "turbo.safetensors"
    tensors, metadata = read_lora(path)
    spec = TurboSpec.from_json(metadata["turbo.spec"])
    assert (spec.family, spec.base, spec.method) == ("sketch", "base", "pcm -> dmd2")
    assert {name.split(".lora_")[0].removesuffix(".alpha") for name in tensors} == {
        f"diffusion_model.layers.{i}.{layer}" for i in (0, 1) for layer in ("mix", "level")
    }
    previews = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in previews if "preview/prompt" in line] == [1, 2]
    assert (run / "previews" / "step-000002.png").is_file()

    out = tmp_path / "pictures"
    words = ["sample", str(path), "--prompt", "colour number 3", "--teacher", "--out", str(out)]
    assert main([*words, "--teacher-steps", "2", "--size", "48x64"]) == 0
    with Image.open(out / "turbo_001_seed0.png") as image:
        assert image.size == (48, 64)
