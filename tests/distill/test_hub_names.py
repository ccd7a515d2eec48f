"""Files that leave this machine name models, not paths."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.config import Config, ConfigError
from distill.contract.metadata import read_header
from distill.contract.spec import HEADER_KEY, TurboSpec
from distill.data.batch import Data
from distill.lora.header import public_config
from distill.lora.model_card import companions
from distill.lora.source import open_source
from distill.lora.thumbnail import COVERS, SIDE, THUMBNAIL, thumbnail_fields
from distill.models.pipeline import find_base
from distill.trainer import train
from distill.utils.hub_names import public_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen-Image-2512", "Qwen/Qwen-Image-2512"),
        ("/home/someone/models/Qwen-Image-2512", "Qwen-Image-2512"),
        ("/home/someone/models/mine/", "mine"),
        ("./models/mine", "mine"),
        ("~/mine", "mine"),
        ("C:\\models\\mine", "mine"),
        ("/x/hub/models--Qwen--Qwen-Image/snapshots/0123abc", "Qwen/Qwen-Image"),
        ("mine", "mine"),
    ],
)
def test_public_names(path: str, name: str) -> None:
    assert public_name(path) == name


def test_a_folder_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "secret")
    assert public_name(".") == "secret"
    monkeypatch.chdir(tmp_path)
    assert public_name("secret/model") == "model"


def test_a_lora_does_not_tell_where_its_base_lay(
    small_config: Callable[..., Config], data: Data, small_model: Path, tmp_path: Path
) -> None:
    """Neither its header, nor what lies beside it; the run folder, which stays, does."""
    preview = {"every": 8, "prompts": 2, "images": 2, "teacher_steps": 2}
    config = small_config(save_every=4, preview=preview)
    lora = train(config, data=data)
    header = read_header(lora)
    for text in (json.dumps(header), *(p.read_text("utf-8") for p in companions(lora)[:1])):
        assert str(small_model) not in text
        assert str(small_model.parent) not in text
        assert str(tmp_path) not in text
    spec = TurboSpec.from_json(header[HEADER_KEY])
    assert spec.base == json.loads(header["turbo.config"])["model"]["path"] == small_model.name
    assert header["ss_base_model_version"] == header["modelspec.base_model"] == small_model.name

    for source in (open_source(config.run_dir), open_source(lora)):
        assert source.model == str(small_model)
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(lora.read_bytes())
    assert open_source(moved).model is None
    with pytest.raises(ConfigError, match="--model: the LoRA was trained on a local folder named"):
        find_base(spec)
    check_thumbnail(header)


def check_thumbnail(header: dict[str, str]) -> None:
    """The preview's pictures, as model browsers read them."""
    kind, _, data = header[THUMBNAIL].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert json.loads(header[COVERS]) == [data]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == ("JPEG", (SIDE, SIDE))


def test_a_thumbnail_is_the_middle_of_four_images() -> None:
    images = torch.ones(5, 3, 8, 24) * torch.tensor([-1, 1, -1, 1, 0])[:, None, None, None]
    images[..., :8] = images[..., 16:] = 0  # cut off
    data = json.loads(thumbnail_fields(images)[COVERS])[0]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        corners = [
            image.convert("L").getpixel(at) for at in ((9, 9), (247, 9), (9, 247), (247, 247))
        ]
    assert corners == pytest.approx([0, 255, 0, 255], abs=3)
    fewer = json.loads(thumbnail_fields(images[1:3])[COVERS])[0]
    with Image.open(io.BytesIO(base64.b64decode(fewer))) as image:
        assert min(image.convert("L").getdata()) > 250  # the first alone


def test_a_discriminators_folder_is_not_told(small_config: Callable[..., Config]) -> None:
    gan = {"features": "/home/someone/dino"}
    stage = {"method": "dmd2", "steps": 1, "gan": gan}
    values = public_config(small_config(stages=[stage], gates={"clip": "/home/someone/clip"}))
    assert "someone" not in json.dumps(values)
    assert values["stages"][0]["gan"]["features"] == "dino"


def test_a_discriminator_without_features_is_told_as_it_is(
    small_config: Callable[..., Config],
) -> None:
    stage = {"method": "pcm", "steps": 1, "gan": {"ratio": 0.2}}
    values = public_config(small_config(stages=[stage]))
    assert values["stages"][0]["gan"]["ratio"] == 0.2
