"""Tokens of an image in the transformers of the model families, on which some schedules depend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .checks import SpecError
from .hints import did_you_mean
from .shown import shown
from .spec import TurboSpec

USUAL_SIZE = (1024, 1024)  # pixels; of what is said about sizes where none is given


@dataclass(frozen=True)
class LatentGrid:
    """pixels: of the side of a latent; patch: latents of the side of a token."""

    pixels: int
    patch: int

    def tokens(self, width: int, height: int) -> int:
        """Of an image of that many pixels, or of one frame."""
        return self.of_latents(-(-width // self.pixels), -(-height // self.pixels))

    def of_latents(self, width: int, height: int) -> int:
        """Of that many latents; what is no whole token is padded to one."""
        return -(-width // self.patch) * -(-height // self.patch)


GRIDS = {  # family of a spec -> its grid
    "qwen-image": LatentGrid(8, 2),
    "qwen-image-2.1": LatentGrid(16, 1),
    "z-image": LatentGrid(8, 2),
    "flux": LatentGrid(8, 2),
    "flux2": LatentGrid(16, 1),
    "wan2.1": LatentGrid(8, 2),
    "wan2.2": LatentGrid(8, 2),
}


def sigmas_at(spec: TurboSpec, size: tuple[int, int] | None = None) -> tuple[float, ...]:
    """The sigmas of an image of `size` (width, height in pixels), of USUAL_SIZE without one.

    Raises SpecError for a family whose grid is not known, where the size matters.
    """
    if not spec.by_size:
        return spec.sigmas()
    if spec.family not in GRIDS:
        raise SpecError(
            f"family: expected one of {', '.join(GRIDS)}, whose tokens are known; found "
            f"{shown(spec.family)}.{did_you_mean(spec.family, GRIDS)}"
        )
    return spec.sigmas(GRIDS[spec.family].tokens(*(size or USUAL_SIZE)))


def sigmas_text(spec: TurboSpec, size: tuple[int, int] | None = None) -> str:
    """`sigmas_at` for people, who are told where they depend on the size; of a family whose grid is
    not known the nodes.
    """
    if not spec.by_size:
        return _listed(spec.sigmas())
    if spec.family not in GRIDS:
        return f"{_listed(spec.nodes)} before a shift by the size of the image"
    width, height = size or USUAL_SIZE
    return f"{_listed(sigmas_at(spec, size))} (at {width}x{height}; other sizes have others)"


def _listed(levels: Iterable[float]) -> str:
    return ", ".join(f"{level:.6g}" for level in levels)
