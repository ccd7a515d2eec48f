"""Tokens that nobody filled in, because the text came by a wire."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ComfyUI", []),
        ("%date:yyyy-MM-dd%/a", ["%date:yyyy-MM-dd%"]),
        ("a_%KSampler.seed%_%Empty Latent Image.width%", None),
        ("%model%", ["%model%"]),
        ("%width%x%height%_%year%%month%%day%_%batch_num%", []),
        ("50% off, 20% more", []),
        ("100%", []),
        ("a sign that reads 30% OFF. Only 5% left", []),
        ("%x% and %x%", ["%x%"]),
    ],
)
def test_tokens(text: str, expected: list[str] | None, pack: Any) -> None:
    if expected is None:
        expected = ["%KSampler.seed%", "%Empty Latent Image.width%"]
    assert pack("nodes.tokens").unfilled_tokens(text) == expected


def test_in_a_file_name(
    pack: Any, output: Path, run_node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save = pack("nodes.save").TurboSaveImage
    save.GET_SCHEMA()
    clone = save.PREPARE_CLASS_CLONE(None)
    images = torch.zeros(1, 8, 8, 3)
    with caplog.at_level(logging.WARNING):
        assert clone.execute(images, "fine", background=False).ui["report"] == []
        assert caplog.text == ""
        (report,) = clone.execute(images, "%Tiny.text%", background=False).ui["report"]
    assert report.startswith("Warning: %Tiny.text% in filename_prefix was not filled in")
    assert "unplug filename_prefix and type it" in caplog.text
