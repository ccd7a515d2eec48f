"""What CLIP and DINO see: features of images and prompts, from models given by folder or hub id."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..config import ConfigError
from ..models.dino import DINO_TYPES

CLIP_TYPES = ("clip",)
BATCH = 16  # images


class Vision:
    """An image encoder with the preprocessing that its folder describes (resize, crop, scale)."""

    def __init__(
        self, model: Any, processor: Any, width: int, encode: Callable[[Tensor], Tensor]
    ) -> None:
        self.model, self.processor, self.width, self.encode = model, processor, width, encode

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] uint8 -> [N, D] float32 in main memory"""
        parts = []
        for chunk in images.split(BATCH):
            pictures = list(chunk.permute(0, 2, 3, 1).numpy())
            pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            parts.append(self.encode(pixels.to(self.model.device)).float().cpu())
        return torch.cat(parts)


class Clip(Vision):
    """A CLIPModel: images and prompts in one space."""

    def __init__(self, path: str, device: torch.device, option: str = "--clip") -> None:
        """Raises ConfigError, naming `option`, unless `path` is one, with its tokenizer and image
        processor.
        """
        from transformers import AutoTokenizer, CLIPModel

        model, processor = _load(option, path, CLIPModel, CLIP_TYPES)
        with _told(option, path, "a tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(path)  # nosec B615 # the user names it
        super().__init__(
            model.to(device),
            processor,
            model.config.projection_dim,
            lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        )

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """[N, D] float32; what exceeds the encoder's length is cut off, its end mark kept."""
        inputs = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        return features.pooler_output.float().cpu()


def load_dino(path: str, device: torch.device) -> Vision:
    """A DINOv2 or DINOv3; its feature is the normalised class token. Raises ConfigError."""
    from transformers import AutoModel

    model, processor = _load("--dino", path, AutoModel, DINO_TYPES)
    return Vision(
        model.to(device),
        processor,
        model.config.hidden_size,
        lambda pixels: model(pixel_values=pixels).pooler_output,
    )


def check_model(option: str, path: str, kinds: tuple[str, ...]) -> None:
    """Raises ConfigError unless `path` names such a model; reads no weights."""
    from transformers import AutoConfig

    with _told(option, path, "a model in transformers layout"):
        kind = AutoConfig.from_pretrained(path).model_type  # nosec B615 # the user names it
    if kind not in kinds:
        raise ConfigError(f"{option}: {path}: expected {' or '.join(kinds)}, found {kind}.")


def _load(option: str, path: str, loader: Any, kinds: tuple[str, ...]) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor

    check_model(option, path, kinds)
    with _told(option, path, "weights and preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(path)  # nosec B615 # the user names it
        model = loader.from_pretrained(path)
    return model.eval().requires_grad_(False), processor


class _told:
    """Turns what transformers says about a path into one line that names the option."""

    def __init__(self, option: str, path: str, expected: str) -> None:
        self.option, self.path, self.expected = option, path, expected

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | ValueError):
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{self.option}: {self.path}: expected {self.expected}, in a folder or under a hub "
                f"id: {first}"
            ) from error


# Figures from features [N, D]


def clip_similarity(images: Tensor, texts: Tensor) -> float:
    """100 times the mean cosine of each image with its prompt."""
    return 100 * cosine_similarity(images, texts).mean().item()


def clip_score(images: Tensor, texts: Tensor) -> float:
    """`clip_similarity`, at least 0 (Hessel et al. 2021).

    The same as torchmetrics' CLIPScore, which takes neither a folder nor the outputs of
    transformers 5, and cuts the end mark off long prompts.
    """
    return max(0.0, clip_similarity(images, texts))


def feature_diversity(features: Tensor, groups: Tensor) -> float:
    """Mean cosine distance between two images of one group, averaged over groups."""
    means = []
    for group in groups.unique():
        x = torch.nn.functional.normalize(features[groups == group].double(), dim=1)
        if len(x) > 1:
            pairs = torch.triu_indices(len(x), len(x), offset=1)
            means.append(1 - (x[pairs[0]] * x[pairs[1]]).sum(1).mean())
    return torch.stack(means).mean().item()


class _Given(torch.nn.Module):
    """Stands in for torchmetrics' Inception: its inputs are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features (Heusel et al. 2017), by torchmetrics."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return _compare(FrechetInceptionDistance(_Given(features.shape[1])), features, reference)


def kid(features: Tensor, reference: Tensor, seed: int = 0) -> float:
    """Kernel distance of two sets of features (Bińkowski et al. 2018), by torchmetrics.

    Mean over 100 random subsets, as large as the smaller set, at most 1000.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(features), len(reference), 1000)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(_Given(features.shape[1]), subsets=100, subset_size=size)
        torch.manual_seed(seed)
        return _compare(metric, features, reference)


def _compare(metric: Any, features: Tensor, reference: Tensor) -> float:
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    value = metric.compute()
    return float(value[0] if isinstance(value, tuple) else value)


def reference_images(folder: Path, size: tuple[int, int]) -> Tensor:
    """All images of a folder and below, cropped to `size`.  # [N, 3, H, W] uint8

    Raises ConfigError where there are fewer than two, or one that cannot be read.
    """
    from ..data.images import BROKEN_IMAGE, IMAGE_SUFFIXES, decode_image, fit

    found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(file for file in found if file.is_file())
    if len(files) < 2:
        raise ConfigError(
            f"--reference: {folder}: expected a folder of real images "
            f"({', '.join(IMAGE_SUFFIXES)}), found {len(files)}."
        )
    images = []
    for file in files:
        try:
            images.append(fit(decode_image(file.read_bytes()), size))
        except BROKEN_IMAGE as error:
            raise ConfigError(
                f"--reference: {file}: cannot be decoded ({error}); remove it from the folder."
            ) from error
    return torch.stack(images)
