"""`turbo-distill prepare` on random models of the real classes, and training data read from it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image
from random_pipelines import write_pipeline
from safetensors.torch import load_file

from distill import cli
from distill.config import Config, ConfigError, DataSection, parse_config
from distill.contract.schedule import schedule
from distill.data import builder as build
from distill.data.batch import Batch
from distill.data.builder import Builder, Rank, identify
from distill.data.chunks import CachePlan
from distill.data.dataset import PreparedData
from distill.data.fingerprint import claim
from distill.data.index import CacheReport, merge
from distill.data.load import load_data
from distill.data.shards import read_record, write_shard
from distill.models import text_encoder as encoders
from distill.models.family import family_of
from distill.models.load import load_vae
from distill.models.qwen_image import pipeline_sigmas
from distill.models.vae import encode
from distill.utils.lock import LOCK, OWNER, single_writer
from distill.utils.rng import Rng

PROMPTS = ["a cat", "a dog in the rain, seen from afar", "two cats", "rain", "the sea at night"]
SIZES = {"a": (64, 64), "b": (100, 60), "c": (56, 60), "d": (90, 50), "e": (60, 100)}
BUCKETS = [[64, 64], [80, 48], [48, 80]]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("models") / "qwen", "qwen-image")


def noise_image(seed: int, size: tuple[int, int]) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 255, (size[1] // 4, size[0] // 4, 3), np.uint8))
    data = io.BytesIO()
    image.resize(size).save(data, "JPEG", quality=90)
    return data.getvalue()


def write_photos(folder: Path, copies: int = 2) -> Path:
    """Ten good images, and one of each kind of bad one."""
    folder.mkdir()
    for i in range(copies):
        for j, (name, size) in enumerate(SIZES.items()):
            (folder / f"{name}{i}.jpg").write_bytes(noise_image(10 * i + j, size))
            (folder / f"{name}{i}.txt").write_text(f"picture {name} number {i}")
    bad = {
        "f_truncated": noise_image(90, (64, 64))[:600],
        "g_zeros": bytes(500),
        "h_empty": b"",
        "i_small": noise_image(91, (20, 20)),
    }
    for name, data in bad.items():
        (folder / f"{name}.jpg").write_bytes(data)
        (folder / f"{name}.txt").write_text("bad")
    (folder / "j_captionless.jpg").write_bytes(noise_image(92, (64, 64)))
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_photos(folder / "photos")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


Make = Callable[..., Config]


@pytest.fixture
def make(model: Path, inputs: Path, tmp_path: Path) -> Make:
    """A configuration; keywords go into its data section, None takes a key out."""

    def config(**keys: object) -> Config:
        stages = keys.pop("stages", [{"method": "dmd2", "steps": 1}])
        path, precision = keys.pop("model", model), keys.pop("precision", "float32")
        data = {
            "cache": tmp_path / "cache",
            "prompts": [inputs / "prompts.txt"],
            "images": [inputs / "photos"],
            "buckets": BUCKETS,
            "teacher_images": 4,
            "teacher_steps": 2,
            "shard": 3,
            "text_batch": 2,
            "dtype": "float32",
        } | keys
        section = {"path": str(path), "dtype": precision}
        values = {"model": section, "data": data, "stages": stages}
        return parse_config(values, "test")

    return config


def prepare(config: Config, rank: int = 0, world: int = 1) -> CacheReport | None:
    data = config.data
    assert isinstance(data, DataSection)
    folder, identity = identify(config, data)
    plan = CachePlan(config, data, identity)
    identity = claim(data.cache, identity)
    Builder(config, data, plan, folder, Rank(rank, world, progress=False)).run()
    return merge(plan, identity)


def quarantine(config: Config) -> list[dict[str, str]]:
    text = (config.data.cache / "quarantine.jsonl").read_bytes().decode()
    return [json.loads(line) for line in text.splitlines()]


def content(cache: Path) -> dict[str, bytes]:
    """All files, but for who writes there."""
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name not in (LOCK, OWNER)
    }


def tensors(cache: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for path in cache.glob("*/*.safetensors"):
        merged |= load_file(path)
    return merged


# What a cache holds


def test_counts_and_quarantine(make: Make) -> None:
    config = make()
    report = prepare(config)
    assert report == CacheReport(
        prompts=5,
        texts=16,  # five prompts, ten captions, the negative one
        real_images=10,
        teacher_images=4,
        upscaled=2,  # c
        set_aside=5,
        buckets={"64x64": 4, "80x48": 4, "48x80": 2},
    )
    cache = config.data.cache
    lines = [json.loads(line) for line in (cache / "quarantine.jsonl").read_text().splitlines()]
    assert {line["item"]: line["reason"].split(":")[0] for line in lines} == {
        "f_truncated.jpg": "cannot be decoded",
        "g_zeros.jpg": "cannot be decoded",
        "h_empty.jpg": "cannot be decoded",
        "i_small.jpg": "too small",
        "j_captionless.jpg": "no caption",
    }


def test_embeddings_are_the_pipelines_own(make: Make, model: Path) -> None:
    config = make(images=[], teacher_images=0)
    prepare(config)
    data = PreparedData(config.data.cache)
    index = json.loads((config.data.cache / "index.json").read_text())
    pipeline = QwenImagePipeline.from_pretrained(model, transformer=None, vae=None)
    for prompt, row in zip(PROMPTS, index["prompts"], strict=True):
        text = pipeline.prompt_template_encode.format(prompt)
        tokens = pipeline.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            states = pipeline.text_encoder(**tokens, output_hidden_states=True).hidden_states[-1]
        expected = states[0, pipeline.prompt_template_encode_start_idx :]
        torch.testing.assert_close(data._embedding(row), expected, atol=1e-5, rtol=1e-5)
    assert len(data.negative.embeds[0]) == index["texts"]["length"][index["negative"]]


def test_latents_are_the_posterior(make: Make, model: Path, inputs: Path) -> None:
    config = make(prompts=[], teacher_images=0)
    prepare(config)
    index = json.loads((config.data.cache / "index.json").read_text())
    latents = tensors(config.data.cache)
    image = Image.open(inputs / "photos" / "a0.jpg").convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, std = encode(load_vae(str(model)), pixels)
    key = index["real"]["key"][0]
    torch.testing.assert_close(latents[f"{key}.mean"], mean[0])
    torch.testing.assert_close(latents[f"{key}.std"], std[0])


def test_teacher_images_are_the_pipelines_own(make: Make, model: Path) -> None:
    """50 guided steps of ours are the pipeline's: same sigmas, guidance, norm rescale."""
    config = make(images=[], teacher_images=1, buckets=[[48, 80]], teacher_steps=5)
    prepare(config)
    plan = CachePlan(config, config.data, identify(config, config.data)[1])
    (unit,) = plan.teacher_of_prompts(0)[0].units
    noise = torch.randn(1, 16, 10, 6, generator=torch.Generator().manual_seed(unit.seed()))
    pipeline = QwenImagePipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline._pack_latents(noise, 1, 16, 10, 6)
    expected = pipeline(
        prompt=unit.text,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        width=48,
        height=80,
        num_inference_steps=5,
        latents=packed,
        output_type="latent",
    ).images
    expected = pipeline._unpack_latents(expected, 80, 48, 8)[0, :, 0]
    (latents,) = (t for name, t in tensors(config.data.cache).items() if name.endswith(".x0"))
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=1e-4)


def test_half_precision(make: Make) -> None:
    stages = [{"method": "dmd2", "steps": 1, "gan": {"features": "pixels", "real_ratio": 0.5}}]
    config = make(precision="bfloat16", dtype="bfloat16", stages=stages)
    prepare(config)
    assert {tensor.dtype for tensor in tensors(config.data.cache).values()} == {torch.bfloat16}
    batch = load_data(config).batch(Rng(0, 0), 2)
    assert batch.x0.dtype == batch.text.embeds.dtype == torch.float32
    assert batch.x0.isfinite().all()
    assert batch.teacher_x0.std() == pytest.approx(1, abs=0.7)


def test_the_schedule_of_the_base_model(model: Path, tmp_path: Path) -> None:
    sigmas = pipeline_sigmas(model, 50, (1328, 1328))
    mu = 0.5 + 0.4 * (83 * 83 - 256) / (8192 - 256)
    assert sigmas == pytest.approx(schedule(50, mu=mu, terminal=0.02), abs=1e-6)
    assert family_of("tiny").sigmas(tmp_path, 4, (64, 64)) == schedule(4, shift=2.0)
    assert len(pipeline_sigmas(tmp_path, 4, (64, 64))) == 5


# Resuming, ranks


class Killed(Exception):
    pass


def test_a_killed_run_continues_to_the_same_bytes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(make(cache=tmp_path / "whole"))
    config = make(cache=tmp_path / "killed")
    write = build.write_shard
    finished = -1
    for kill_at in (2, 3, 1, 4):
        writes = 0

        def dying(*args: object, kill_at: int = kill_at) -> None:
            nonlocal writes
            writes += 1
            if writes == kill_at:
                raise Killed
            write(*args)

        with monkeypatch.context() as patch:
            patch.setattr(build, "write_shard", dying)
            with pytest.raises(Killed):
                prepare(config)
        shards = len(list((tmp_path / "killed").glob("*/*.safetensors")))
        assert shards > finished or kill_at == 1
        finished = shards
        with pytest.raises(ConfigError, match="was not finished"):
            load_data(config)
    assert prepare(config) is not None
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.slow
def test_sigkill_leaves_a_cache_that_continues(make: Make, tmp_path: Path, inputs: Path) -> None:
    prepare(make(cache=tmp_path / "whole"))
    config = make(cache=tmp_path / "killed")
    code = (
        "import os, signal, sys; from distill import cli; from distill.data import shards\n"
        "from pathlib import Path; import pathlib; n = 0\n"
        "def fsync(fd):\n"
        "    global n; n += 1\n"
        "    if n == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.os.fsync = fsync\n"
        "cli.main(sys.argv[1:])\n"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments(config)], check=False)
    assert result.returncode == -9
    (leftover,) = (tmp_path / "killed").rglob(".*.tmp")
    os.utime(leftover, (0, 0))
    assert prepare(config) is not None
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def arguments(config: Config) -> list[str]:
    """The command line that says the same as `config`."""
    data = config.data.model_dump(mode="json", exclude_defaults=True)
    return [
        "prepare",
        f"model.path={config.model.path}",
        f"model.dtype={config.model.dtype}",
        *(f"data.{key}={json.dumps(value)}" for key, value in data.items()),
    ]


@pytest.mark.parametrize("prompts", [True, False])
def test_ranks_share_the_work(make: Make, tmp_path: Path, prompts: bool) -> None:
    keys = {} if prompts else {"prompts": []}
    prepare(make(cache=tmp_path / "one", **keys))
    several = make(cache=tmp_path / "three", **keys)
    assert prepare(several, rank=1, world=3) is None
    first = set(content(tmp_path / "three"))
    assert prepare(several, rank=0, world=3) is None
    assert set(content(tmp_path / "three")) > first
    assert prepare(several, rank=2, world=3) is not None
    assert content(tmp_path / "three") == content(tmp_path / "one")


def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[str]]:
    """Images that are encoded from now on, and prompts."""
    encoded: list[int] = []
    embedded: list[str] = []
    real, text = Builder._encode, encoders.QwenTextEncoder.encode
    monkeypatch.setattr(Builder, "_encode", lambda self, *a: encoded.append(1) or real(self, *a))
    monkeypatch.setattr(
        encoders.QwenTextEncoder, "encode", lambda self, p: embedded.extend(p) or text(self, p)
    )
    return encoded, embedded


def test_more_inputs_keep_what_was_made(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New prompts and images shift all chunks; nothing is computed twice for that."""
    photos = write_photos(tmp_path / "photos", copies=1)
    prompts = tmp_path / "p.txt"
    prompts.write_text("\n".join(PROMPTS[1:]))
    config = make(images=[photos], prompts=[prompts])
    prepare(config)
    before = tensors(config.data.cache)
    (photos / "a.jpg").write_bytes(noise_image(50, (64, 64)))
    (photos / "a.txt").write_text("a new one")
    prompts.write_text("\n".join(PROMPTS))
    encoded, embedded = counted(monkeypatch)
    report = prepare(config)
    assert (report.real_images, report.prompts, report.set_aside) == (6, 5, 5)
    assert len(encoded) == 1
    assert sorted(embedded) == ["a cat", "a new one"]
    after = tensors(config.data.cache)
    assert set(before) < set(after)
    batch = load_data(config).batch(Rng(0, 0), 4)
    assert batch.x0.isfinite().all()


def test_a_cache_that_moved_resumes(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its images, whose times of change are lost on the way."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    write_photos(before / "photos", copies=1)
    keys = {"prompts": [], "teacher_images": 0}
    first = prepare(make(cache=before / "cache", images=[before / "photos"], **keys))
    shutil.copytree(before, after, copy_function=shutil.copyfile)
    shutil.rmtree(before)
    encoded, embedded = counted(monkeypatch)
    moved = make(cache=after / "cache", images=[after / "photos"], **keys)
    assert prepare(moved) == first
    assert (encoded, embedded) == ([], [])
    assert len(PreparedData(after / "cache").batch(Rng(0, 0), 4).x0) == 4
    assert {line["source"] for line in quarantine(moved)} == {str(after / "photos")}


def test_what_an_older_version_set_aside_is_read_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_photos(tmp_path / "photos", copies=1)
    config = make(images=[photos], prompts=[], teacher_images=0, shard=5)
    report = prepare(config)
    good, bad = sorted(
        (config.data.cache / "real").iterdir(), key=lambda path: len(read_record(path)["problems"])
    )
    written = good.read_bytes()
    for path in (good, bad):
        record = read_record(path)
        del record["reader"]
        write_shard(path, load_file(path), record)
    unmarked = good.read_bytes()
    assert prepare(config) == report
    assert "reader" in read_record(bad)
    assert good.read_bytes() == unmarked != written


# Reading it


@pytest.fixture(scope="session")
def cache(
    model: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PreparedData]:
    """Prepared data of three kinds, made once."""
    root = tmp_path_factory.mktemp("caches")

    def get(kind: str, rows: str = "real") -> PreparedData:
        path = root / kind
        if not path.exists():
            data = {"cache": path, "buckets": BUCKETS, "dtype": "float32", "teacher_steps": 2}
            data["prompts"] = inputs / "prompts.txt"
            data["images"] = inputs / "photos" if "real" in kind else []
            data["teacher_images"] = 6 if "teacher" in kind else 0
            section = {"path": str(model), "dtype": "float32"}
            stages = [{"method": "dmd2", "steps": 1}]
            prepare(parse_config({"model": section, "data": data, "stages": stages}, "test"))
        return PreparedData(path, [(1, rows)])

    return get


KINDS = ["real", "teacher", "prompts", "real+teacher"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["real", "teacher", "any", "mixed"])
def test_two_ranks_see_what_one_sees(
    cache: Callable[..., PreparedData], kind: str, rows: str
) -> None:
    data = cache(kind, rows)
    for step in range(5):
        whole = data.batch(Rng(3, step), 6)
        parts = [data.batch(Rng(3, step, rank, 3), 2) for rank in range(3)]
        assert torch.equal(whole.x0, torch.cat([p.x0 for p in parts]))
        assert torch.equal(whole.text.embeds, torch.cat([p.text.embeds for p in parts]))
        if "teacher" not in kind or ("real" in kind and rows in ("real", "any")):
            assert whole.teacher_x0 is None
        else:
            assert whole.teacher_x0 is not None
        if whole.teacher_x0 is not None:
            assert torch.equal(whole.teacher_x0, torch.cat([p.teacher_x0 for p in parts]))
            assert whole.teacher_x0.shape == whole.x0.shape
        if whole.text.mask is None:
            assert all(p.text.mask is None for p in parts)
        else:
            assert torch.equal(whole.text.mask, torch.cat([p.text.mask for p in parts]))
        again = data.batch(Rng(3, step), 6)
        assert torch.equal(whole.x0, again.x0)


def test_buckets_come_as_often_as_they_hold_images(cache: Callable[..., PreparedData]) -> None:
    data = cache("real")
    shapes = [tuple(data.batch(Rng(0, step), 1).x0.shape[2:]) for step in range(300)]
    assert {shape: shapes.count(shape) / 300 for shape in set(shapes)} == pytest.approx(
        {(8, 8): 0.4, (6, 10): 0.4, (10, 6): 0.2}, abs=0.08
    )


def test_rows_pair_images_with_their_captions(cache: Callable[..., PreparedData]) -> None:
    data = cache("real")
    index = json.loads((data.cache / "index.json").read_text())
    latents = tensors(data.cache)
    batch = data.batch(Rng(1, 1), 8)
    eps = Rng(1, 1).normal("data/posterior", tuple(batch.x0.shape))
    for row, text in enumerate(known_texts(data, batch)):
        (image,) = (
            i
            for i, key in enumerate(index["real"]["key"])
            if latents[f"{key}.mean"].shape == eps[row].shape
            and torch.equal(
                batch.x0[row], latents[f"{key}.mean"] + latents[f"{key}.std"] * eps[row]
            )
        )
        assert index["real"]["text"][image] == text


def test_teacher_images_stand_in_for_real_ones(cache: Callable[..., PreparedData]) -> None:
    batch = cache("teacher").batch(Rng(0, 2), 4)
    assert torch.equal(batch.x0, batch.teacher_x0)


def test_prompts_alone_give_zeros(cache: Callable[..., PreparedData]) -> None:
    batch = cache("prompts").batch(Rng(0, 2), 4)
    assert tuple(batch.x0.shape) in {(4, 16, 8, 8), (4, 16, 6, 10), (4, 16, 10, 6)}
    assert not batch.x0.any()
    assert len(batch.text) == 4


def known_texts(data: PreparedData, batch: Batch) -> list[int]:
    """Which text of the index each row is."""
    mask, embeds = batch.text.mask, batch.text.embeds
    found = []
    for row in range(len(embeds)):
        count = embeds.shape[1] if mask is None else int(mask[row].sum())
        assert not embeds[row, count:].any()
        texts = range(len(data._lengths))
        (text,) = (
            i
            for i in texts
            if data._lengths[i] == count and torch.equal(embeds[row, :count], data._embedding(i))
        )
        found.append(text)
    return found


@pytest.mark.parametrize("rows", ["any", "mixed"])
def test_rows_drawn_from_all_texts(cache: Callable[..., PreparedData], rows: str) -> None:
    data = cache("real+teacher", rows)
    index = json.loads((data.cache / "index.json").read_text())
    batches = [data.batch(Rng(0, step), 8) for step in range(12)]
    drawn = {text for batch in batches for text in known_texts(data, batch)}
    assert drawn == {*index["prompts"], *index["real"]["text"]}
    if rows == "any":  # nothing asks for the teacher's images: they are not read
        assert all(batch.teacher_x0 is None for batch in batches)
    else:
        assert all(batch.teacher_x0.shape == batch.x0.shape for batch in batches)
        assert not any(torch.equal(batch.teacher_x0, batch.x0) for batch in batches)


def test_mixed_rows_need_a_size_with_both(
    cache: Callable[..., PreparedData], tmp_path: Path
) -> None:
    index = json.loads((cache("real+teacher").cache / "index.json").read_text())
    for bucket, kind in enumerate(("real", "teacher")):
        index[kind]["bucket"] = [bucket] * len(index[kind]["bucket"])
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"no size has both .* Raise data\.teacher_images"):
        PreparedData(tmp_path, [(1, "mixed")])
    assert PreparedData(tmp_path, [(1, "any")]).has_images


def test_teacher_rows_are_the_teachers(cache: Callable[..., PreparedData]) -> None:
    data = cache("real+teacher", "teacher")
    index = json.loads((data.cache / "index.json").read_text())
    latents = tensors(data.cache)
    batch = data.batch(Rng(0, 0), 6)
    assert torch.equal(batch.x0, batch.teacher_x0)
    rows = zip(index["teacher"]["key"], index["teacher"]["text"], strict=True)
    pairs = [(latents[f"{key}.x0"], text) for key, text in rows]
    for x0, text in zip(batch.x0, known_texts(data, batch), strict=True):
        assert any(torch.equal(x0, image) and text == prompt for image, prompt in pairs)


def test_every_stage_gets_its_rows(make: Make) -> None:
    latent = {"features": "latent", "real_ratio": 0}
    stages = [
        {"method": "pcm", "steps": 2},
        {"method": "dmd2", "steps": 1},
        {"method": "dmd2", "steps": 1, "gan": {"features": "pixels"}},
        {"method": "dmd2", "steps": 1, "gan": {"features": "pixels", "real_ratio": 0.5}},
        {"method": "dmd2", "steps": 1, "gan": {"features": "latent"}},
        {"method": "dmd2", "steps": 1, "gan": latent},
    ]
    config = make(stages=stages)
    prepare(config)
    data = load_data(config)
    kinds = [data.rows_at(step) for step in range(8)]
    assert kinds == ["real", "real", "any", "any", "mixed", "real", "teacher", "teacher"]


def test_a_recipe_trains_from_the_cache(make: Make, tmp_path: Path) -> None:
    """prepare -> train: neither text encoder nor VAE encoder is read any more."""
    from distill.trainer import train

    stages = [{"method": "pcm", "steps": 2, "batch": 2, "points": 2}]
    config = make(stages=stages)
    prepare(config)
    values = config.model_dump(mode="json")
    preview = {"every": 2, "prompts": 2, "images": 2, "teacher_steps": 2}
    values |= {"run_dir": str(tmp_path / "run"), "preview": preview, "save_every": 0}
    values["adapter"]["rank"] = 2
    assert train(parse_config(values, "test")).is_file()
    folder = tmp_path / "run" / "previews"
    assert (folder / "prompts.txt").read_text().splitlines() == PROMPTS[:2]
    with Image.open(folder / "step-000002.png") as picture:
        assert picture.height > 2 * 2 * 64  # student and teacher, two images each


def test_the_lora_knows_its_sizes_and_a_moved_cache_goes_on(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of its buckets those that hold images; and content is what a cache and a run are known by."""
    from distill.contract.metadata import read_header
    from distill.contract.spec import TurboSpec
    from distill.trainer import train

    buckets = [*BUCKETS, [16, 256]]

    def recipe(steps: int, **keys: object) -> Config:
        stages = [{"method": "pcm", "steps": steps, "batch": 2, "points": 2}]
        values = make(stages=stages, buckets=buckets).model_dump(mode="json")
        values |= {"run_dir": str(tmp_path / "run"), "preview": {"every": 0}, "save_every": 0}
        values["adapter"]["rank"] = 2
        return parse_config(values | keys, "test")

    prepare(recipe(2))
    lora = train(recipe(2))
    spec = TurboSpec.from_json(read_header(lora)["turbo.spec"])
    assert spec.resolutions == tuple((w, h) for w, h in BUCKETS)
    card = lora.with_suffix(".md").read_text("utf-8")
    assert "width=64" in card
    assert "height=64" in card
    listed = train(recipe(1, run_dir=str(tmp_path / "l"), spec={"resolutions": [[48, 48]]}))
    assert '"resolutions": [[48, 48]]' in read_header(listed)["turbo.spec"]

    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "renamed")
    data = {**recipe(3).data.model_dump(mode="json"), "cache": str(tmp_path / "moved")}
    longer = recipe(3, run_dir=str(tmp_path / "renamed"), data=data)
    assert train(longer, resume=True).is_file()
    assert f"data.cache: {tmp_path / 'cache'} -> {tmp_path / 'moved'} (moved" in caplog.text


def test_examples_are_the_first_prompts_in_the_commonest_size(make: Make) -> None:
    config = make()
    prepare(config)
    data = PreparedData(config.data.cache)
    examples = data.examples(7)
    captions = [f"picture {name} number {i}" for i in range(2) for name in SIZES]
    assert examples.prompts[:5] == tuple(PROMPTS)
    assert set(examples.prompts[5:]) <= set(captions)
    assert examples.size == (64, 64)
    index = json.loads((config.data.cache / "index.json").read_text())
    for text, row in zip(examples.texts, index["prompts"], strict=False):
        assert text.mask is None
        assert torch.equal(text.embeds[0], data._embedding(row))


# Bad input


def test_a_cache_of_another_configuration_is_refused(
    make: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = make()
    prepare(config)
    assert isinstance(load_data(config), PreparedData)
    other = make(buckets=[[64, 64]], dtype="bfloat16", negative="bad", teacher_steps=3)
    for refusing in (load_data, prepare):
        with pytest.raises(ConfigError) as error:
            refusing(other)
        message = str(error.value)
        for words in (
            "buckets: expected [[64, 64]], found [[64, 64], [80, 48], [48, 80]]",
            'dtype: expected "bfloat16", found "float32"',
            'negative: expected "bad", found " "',
            '"steps": 3',
            str(config.data.cache),
        ):
            assert words in message
    stranger = write_pipeline(tmp_path_factory.mktemp("models") / "other", "qwen-image", seed=1)
    for refusing in (load_data, prepare):
        with pytest.raises(ConfigError) as error:
            refusing(make(model=stranger))
        for part in ("text_encoder", "vae", "transformer"):
            assert f"  {part}: expected" in str(error.value)


def test_a_moved_model_is_the_same_model(make: Make, model: Path, tmp_path: Path) -> None:
    config = make(images=[], teacher_images=0)
    prepare(config)
    moved = tmp_path / "moved"
    moved.symlink_to(model)
    assert isinstance(load_data(make(model=moved)), PreparedData)


def test_without_a_cache(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache holds no prepared data.*turbo-distill prepare"):
        load_data(make())


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"method": "pcm"}, "holds prompts only, but the stage 'pcm' starts from images"),
        ({"method": "dmd2", "gan": {"features": "pixels"}}, "expected 0 .* found 1"),
    ],
)
def test_a_stage_that_needs_images(make: Make, stage: dict[str, object], words: str) -> None:
    config = make(images=[], teacher_images=0, stages=[stage | {"steps": 1}])
    prepare(config)
    with pytest.raises(ConfigError, match=words):
        load_data(config)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.tar", b""), ("a.tar", b"junk" * 999), ("a.tar", bytes(10240)), ("a.tar.gz", b"\x1f\x8b")],
)
def test_an_archive_of_nothing_is_an_error(
    make: Make, tmp_path: Path, name: str, data: bytes
) -> None:
    """Before any model is loaded, and although there are prompts."""
    (tmp_path / name).write_bytes(data)
    config = make(images=[tmp_path / name])
    with pytest.raises(ConfigError, match=rf"no image.*{name}.*the archive"):
        CachePlan(config, config.data, identify(config, config.data)[1])


def test_every_bad_item_is_named_and_none_ends_the_run(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("good", "gbk", "wide", os.fsdecode(b"\xff"), "script"):
        (photos / f"{name}.jpg").write_bytes(noise_image(1, (64, 64)))
        (photos / f"{name}.txt").write_text("a picture")
    (photos / "gbk.txt").write_bytes("红色".encode("gbk"))
    (photos / "wide.txt").write_bytes("a wide picture".encode("utf-16"))
    (photos / "script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (photos / os.fsdecode(b"\xfe.jpg")).write_bytes(b"")
    os.mkfifo(photos / "pipe.jpg")
    config = make(images=[photos], prompts=[], teacher_images=0)
    assert cli.main(arguments(config)) == 0
    printed = capsys.readouterr()
    assert "3 real images" in printed.out
    assert "prepared (4 items set aside) in" in printed.err.splitlines()[-1]
    reasons = {line["item"]: line["reason"] for line in quarantine(config)}
    assert reasons.keys() == {"gbk.txt", "script.jpg", "\udcfe.jpg", "pipe.jpg"}
    assert "save gbk.txt as UTF-8" in reasons["gbk.txt"]
    assert "no picture of a kind" in reasons["script.jpg"]


def test_prompts_that_are_cut_are_told(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "".join(f"{i} ünd " for i in range(300))
    prompts = [long + "a cat", long + "a dog", "ß" + long, "short", "x" * 700]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(prompts))
    config = make(images=[], teacher_images=0, prompts=[path])
    assert cli.main(arguments(config)) == 0
    printed = capsys.readouterr()
    assert "3 prompts cut, see" in printed.out
    assert "prepared (3 prompts cut) in" in printed.err.splitlines()[-1]
    lines = {line["item"]: line["reason"] for line in quarantine(config)}
    assert lines.keys() == {prompt.strip() for prompt in prompts[:3]}
    for prompt, reason in lines.items():
        assert reason.startswith("cut: 1,024 tokens are embedded, and nothing after '")
        kept = reason.split("'")[1]
        assert kept in prompt
        assert ("equal up to there: 1 others" in reason) == prompt.endswith(("cat", "dog"))
    rows = json.loads((config.data.cache / "index.json").read_text())["prompts"]
    data = PreparedData(config.data.cache)
    first, second, third = (data._embedding(row) for row in rows[:3])
    assert torch.equal(first, second)
    assert first.shape == third.shape
    assert not torch.equal(first, third)


def test_an_archive_without_a_usable_image_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"junk" * 1000)
    config = make(images=[tmp_path / "a.tar"])
    with pytest.raises(ConfigError, match=r" \S+a\.tar: the archive is damaged"):
        prepare(config)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"\0" * 100)
    (tmp_path / "broken" / "a.txt").write_text("zeros")
    config = make(images=[tmp_path / "a.tar", tmp_path / "broken"])
    with pytest.raises(ConfigError, match=r"first reason: \S+a\.tar: the archive is damaged"):
        prepare(config)


def test_no_usable_image(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"\0" * 100)
    (folder / "a.txt").write_text("zeros")
    config = make(images=[folder])
    with pytest.raises(ConfigError, match=r"none of the 1 images.*a\.jpg: cannot be decoded"):
        prepare(config)
    assert not (config.data.cache / "index.json").exists()
    assert (config.data.cache / "quarantine.jsonl").exists()


def test_a_missing_component(make: Make, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "vae").symlink_to(model / "vae")
    with pytest.raises(ConfigError, match=r"half.text_encoder holds no weights"):
        prepare(make(model=folder))


def test_a_damaged_shard_is_named(make: Make) -> None:
    config = make(images=[], teacher_images=0)
    prepare(config)
    shard = next((config.data.cache / "text").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ConfigError, match=rf"{shard.name}.*Delete this file"):
        prepare(config)
    shard.unlink()
    assert prepare(config) is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.cache=c"], "nothing to prepare"),
        (["data=tiny", "model.path=tiny"], "nothing to prepare"),
        (["data.cache=c", "data.prompts=gone.txt"], "gone.txt does not exist"),
        (["data.cache=c", "data.images=gone"], "gone does not exist"),
        (["data.cahce=c"], "Did you mean 'cache'"),
        (["a.yaml", "b.yaml"], "expected one configuration file"),
    ],
)
def test_the_command_line_refuses(
    words: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = any(word.startswith("model.path") for word in words)
    assert cli.main(["prepare", *words, *([] if named else [f"model.path={model}"])]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str], inputs: Path) -> None:
    words = [
        "model.path=./nowhere/at/all",
        f"data.prompts={inputs / 'prompts.txt'}",
        "data.cache=c",
    ]
    assert cli.main(["prepare", *words]) == 2
    assert "./nowhere/at/all is neither a folder here nor a model" in capsys.readouterr().err


def test_the_command_line_prepares(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make()
    assert cli.main(arguments(config)) == 0
    printed = capsys.readouterr()
    assert "10 real images" in printed.out
    assert "5 items set aside" in printed.out
    assert "real images" in printed.err  # progress
    assert cli.main([*arguments(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["real_images"], found["set_aside"]) == (10, 5)
    assert Path(found["index"]).is_file()
    assert Path(found["quarantine"]).is_file()
    assert isinstance(load_data(config), PreparedData)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_run_prepares_a_cache_at_a_time(
    rank: int, make: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank stands for all of a run: the others share its cache."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = make(images=[], teacher_images=0)
    with single_writer(config.data.cache):
        assert cli.main(arguments(config)) == (2 if rank == 0 else 0)
    told = f"{config.data.cache}: process {os.getpid()} on " in capsys.readouterr().err
    assert told == (rank == 0)
    assert (config.data.cache / "cache.json").exists() == (rank == 1)


@pytest.mark.slow
def test_a_full_disk(make: Make, tmp_path: Path) -> None:
    """The system refuses to write more than a few kB per file, as a full disk would."""
    config = make()
    code = (
        "import resource, sys; from distill import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments(config)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.returncode == 1
    assert "could not be written: File too large" in result.stderr
    assert "make room and run the same command again" in result.stderr
    assert sorted(content(config.data.cache)) == ["cache.json"]
    assert prepare(config) is not None
