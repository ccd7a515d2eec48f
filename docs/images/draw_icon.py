"""icon.png and banner.png of the registry, drawn by the tiny model: noise, one step, two steps.

python docs/images/draw_icon.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from distill.contract.tiny import IMAGE_SIZE, TINY_DIR
from distill.lora.source import open_source
from distill.models.pipeline import Pipeline, embed, find_base, teacher_guidance
from distill.models.sample import noise_of_seeds

HERE = Path(__file__).parent
SIZE = (IMAGE_SIZE, IMAGE_SIZE)
ROWS = (("a yellow letter T", 3), ("a red letter K", 7), ("a white letter S", 1))
ICON = 0  # the row
BACKGROUND, INK, SOFT = (21, 21, 27), (242, 242, 246), (160, 160, 172)
SMOOTH = Image.Resampling.LANCZOS


def draw_rows() -> list[list[Image.Image]]:
    """Per prompt: the noise, the image after one step, the image after two."""
    source = open_source(TINY_DIR / "lora" / "tiny_turbo_2_steps.safetensors")
    base, cpu = find_base(source.spec), torch.device("cpu")
    prompts, seeds = [prompt for prompt, _ in ROWS], [seed for _, seed in ROWS]
    guidance = teacher_guidance(source.metadata, base)
    pipeline = Pipeline(base, {"lora": source.lora}, guidance, embed(base, prompts, cpu), cpu)
    with torch.no_grad():
        noise = pipeline._images(noise_of_seeds(seeds, pipeline.roles.latent_shape(SIZE)))
    one = pipeline.student("lora", source.spec.with_sigmas((1.0, 0.0)), prompts, seeds, SIZE)
    two = pipeline.student("lora", source.spec, prompts, seeds, SIZE)
    columns = [[as_image(x) for x in images] for images in (noise, one, two)]
    return [list(row) for row in zip(*columns, strict=True)]


def as_image(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def font(pixels: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), pixels)


def rounded(image: Image.Image, side: int, radius: int) -> Image.Image:
    """Square, with round corners on a transparent ground."""
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side, 4 * side), 4 * radius, fill=255)
    shown = image.resize((side, side), SMOOTH).convert("RGBA")
    shown.putalpha(mask.resize((side, side), SMOOTH))
    return shown


def icon(row: list[Image.Image], side: int = 400) -> Image.Image:
    """One letter that comes out of the noise from left to right."""
    noise, one, two = (image.resize((side, side), SMOOTH) for image in row)
    sheet = two.copy()
    first, second = round(side * 0.26), round(side * 0.5)
    sheet.paste(one.crop((first, 0, second, side)), (first, 0))
    sheet.paste(noise.crop((0, 0, first, side)), (0, 0))
    draw = ImageDraw.Draw(sheet)
    for x in (first, second):
        draw.rectangle((x - 2, 0, x + 1, side), fill=BACKGROUND)
    return rounded(sheet, side, side // 6)


def banner(rows: list[list[Image.Image]], width: int = 1680, height: int = 720) -> Image.Image:
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((90, 250), "Turbo Distill", INK, font=font(88, bold=True), anchor="lm")
    draw.text((92, 345), "Qwen-Image in 2 steps", INK, font=font(44), anchor="lm")
    lines = (
        "Nodes that sample a few-step LoRA",
        "as it was trained, and the trainer",
        "that makes one.",
    )
    for i, text in enumerate(lines):
        draw.text((92, 425 + 44 * i), text, SOFT, font=font(31), anchor="lm")
    side, gap = 186, 18
    left, top = width - 3 * side - 2 * gap - 90, (height - 3 * side - 2 * gap) // 2 + 18
    for i, caption in enumerate(("noise", "step 1", "step 2")):
        center = left + i * (side + gap) + side // 2
        draw.text((center, top - 26), caption, SOFT, font=font(26), anchor="mm")
        for j, row in enumerate(rows):
            tile = rounded(row[i], side, 16)
            sheet.paste(tile, (left + i * (side + gap), top + j * (side + gap)), tile)
    return sheet


def main() -> None:
    rows = draw_rows()
    icon(rows[ICON]).save(HERE / "icon.png", optimize=True)
    banner(rows).quantize(256).save(HERE / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
