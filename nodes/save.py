"""Turbo Save Image: core's SaveImage, without making the next prompt wait for PNG files."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths
import torch
from aiohttp import web
from comfy.cli_args import args
from comfy_api.latest import io
from PIL.PngImagePlugin import PngInfo

from ..distill.contract.shown import shown
from .png_writer import PngWriter, SaveError, reserve, sweep, to_picture
from .stopping import before_stop
from .tokens import prefix_warnings
from .ui import CATEGORY, FrontEnd, server, show_on_node, with_warnings

NODE_ID = "TurboDistillSaveImage"
HIDDEN = [io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id, io.Hidden.dynprompt]
VIEW_PATHS = ("/view", "/api/view")
COMPRESS_LEVEL = 1  # less than half the time of core's 4; files up to a sixth larger

VIEW_S = 60  # how long /view waits: longer than all pictures that may be under way take

WRITER = PngWriter()  # one for the process, so that all nodes share its memory limit
FAILURES: Counter[str] = Counter()  # of the node with this id, in the background
_swept: set[str] = set()


# ------------------------------------------------------------------------------------------ saving


@dataclass(frozen=True)
class Saving:
    """How and for whom pictures are saved; paths: those of all that were handed to the writer."""

    filename_prefix: str
    metadata: PngInfo | None = None
    compress_level: int = COMPRESS_LEVEL
    on_error: Callable[[SaveError], None] | None = None
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        hidden: Any,
        filename_prefix: str,
        compress_level: int,
        background: bool,
        front_end: FrontEnd | None,
    ) -> Saving:
        """For a node with these widgets; an error after its end is shown by the front end, and
        remembered by `failures_of`.
        """
        metadata = png_metadata(hidden.prompt, hidden.extra_pnginfo)
        node_id = hidden.unique_id

        def tell(error: SaveError) -> None:
            FAILURES[node_id] += 1
            if front_end is not None:
                front_end.show_error(error)

        return cls(filename_prefix, metadata, compress_level, tell if background else None)


def save_images(
    images: torch.Tensor, saving: Saving, writer: PngWriter = WRITER, first_number: int = 0
) -> list[dict[str, str]]:
    """Takes a name for every image, hands it to the writer and returns what the front end shows.

    images: [B, H, W, C] in [0, 1]. first_number: what %batch_num% starts at.
    Raises SaveError where an earlier picture of this `saving` failed, ValueError for a prefix that
    no file's name can begin with, and what core's SaveImage raises.
    """
    _check_prefix(saving.filename_prefix)
    writer.raise_failures(saving.paths)
    height, width = images.shape[1:3]
    folder, name, counter, subfolder = _free_name(saving.filename_prefix, width, height)
    if "%batch_num%" in name:  # core's own counter does not see such files
        counter += first_number
    saved = []
    for number, image in enumerate(images, first_number):
        picture = to_picture(image)
        stem = name.replace("%batch_num%", str(number))
        path, counter = reserve(Path(os.path.abspath(folder)), stem, counter)
        writer.submit(path, picture, saving.metadata, saving.compress_level, saving.on_error)
        saving.paths.append(path)
        saved.append({"filename": path.name, "subfolder": subfolder, "type": "output"})
        counter += 1
    return saved


def _check_prefix(prefix: str) -> None:
    try:
        prefix.encode()
    except UnicodeEncodeError:  # half a pair of surrogates
        raise ValueError(
            f"filename_prefix: expected text in Unicode; found {shown(prefix)}"
        ) from None


def _free_name(prefix: str, width: int, height: int) -> tuple[str, str, int, str]:
    """Core's folder, name, number and subfolder; what a killed server left takes no number."""

    def ask_core() -> tuple[str, str, int, str]:
        output = folder_paths.get_output_directory()
        return folder_paths.get_save_image_path(prefix, output, width, height)[:4]

    found = ask_core()
    if found[0] in _swept:
        return found
    _swept.add(found[0])
    return ask_core() if sweep(Path(found[0])) else found


def png_metadata(prompt: Any, extra_pnginfo: dict[str, Any] | None) -> PngInfo | None:
    """The texts that core's SaveImage puts into a PNG; none with --disable-metadata."""
    if args.disable_metadata:
        return None
    texts = {} if prompt is None else {"prompt": prompt}
    metadata = PngInfo()
    for name, value in (*texts.items(), *(extra_pnginfo or {}).items()):
        metadata.add_text(name, json.dumps(value))
    return metadata


def finish(background: bool, saving: Saving, writer: PngWriter = WRITER) -> None:
    """Waits for the files where somebody else may look for them before they are there."""
    # with --enable-assets core reads every file as soon as the node returns
    if not (background and serves_pending_files() and not args.enable_assets):
        writer.flush(saving.paths)


def failures_of(node_id: str) -> int:
    """Changes after a node's picture failed in the background, so that core runs the node again
    when its prompt is queued again, instead of taking it for done.
    """
    return FAILURES[node_id]


# ------------------------------------------------------------------------------------- the server


def start() -> None:
    """Called once, when ComfyUI has loaded the pack."""
    hold_views()
    before_stop(WRITER.finish)
    output = Path(folder_paths.get_output_directory())
    # beside the start: there may be many folders, on a slow disk
    threading.Thread(target=sweep, args=(output,), kwargs={"deep": True}, daemon=True).start()


def hold_views() -> None:
    """Puts `hold_view` before the routes of the server, which starts after nodes are loaded."""
    app = getattr(server(), "app", None)
    if app is not None and not app.frozen:
        app.middlewares.append(hold_view)


def serves_pending_files() -> bool:
    """Whether a request for a file that is being written waits for it."""
    return hold_view in getattr(getattr(server(), "app", None), "middlewares", ())


@web.middleware
async def hold_view(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Lets /view wait for a picture that is on its way to the disk; anything else passes."""
    path = _viewed_path(request) if request.path in VIEW_PATHS else None
    if path is not None:
        if (pending := WRITER.pending(path)) is not None:
            # wait cancels nothing: a client that goes away must not cancel the file
            await asyncio.wait([asyncio.wrap_future(pending)], timeout=VIEW_S)
            if not pending.done():
                text = f"{path} is not written after {VIEW_S} s. Does its disk answer?"
                return web.Response(status=504, text=text)
        if (failure := WRITER.failure(path)) is not None:
            return web.Response(status=500, text=str(failure))
    return await handler(request)


def _viewed_path(request: web.Request) -> Path | None:
    """The output file that core's /view would read; None where it is none of ours."""
    query = request.rel_url.query
    name, folder = folder_paths.annotated_filepath(query.get("filename", ""))
    folder = folder or folder_paths.get_directory_by_type(query.get("type", "output"))
    if not name or folder is None:
        return None
    return Path(os.path.abspath(os.path.join(folder, query.get("subfolder", ""), Path(name).name)))


# -------------------------------------------------------------------------------------------- node


def prefix_input() -> io.String.Input:
    """The file name as core's SaveImage has it."""
    return io.String.Input(
        "filename_prefix",
        default="ComfyUI",
        tooltip="Folder and start of the file names in ComfyUI's output folder, as in Save Image: "
        "%date:yyyy-MM-dd%, %width%, %Node.widget% and the like are filled in.",
    )


def saving_inputs() -> list[io.Input]:
    """How PNG files are written."""
    return [
        io.Int.Input(
            "compress_level",
            default=COMPRESS_LEVEL,
            min=0,
            max=9,
            optional=True,
            advanced=True,
            tooltip="Effort of the PNG compression; the pixels are the same. Core's Save Image "
            "uses 4. 1 takes half of its time. 0 does not compress at all.",
        ),
        io.Boolean.Input(
            "background",
            default=True,
            optional=True,
            advanced=True,
            tooltip="Write the files while the next prompt runs; the front end and /view wait for "
            "them. Off: they are on disk when the node is done, for programs that read the output "
            "folder themselves.",
        ),
    ]


class TurboSaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE_ID,
            display_name="Turbo Save Image",
            category=CATEGORY,
            description="Saves images as core's Save Image does, with the same names, pixels and "
            "workflow inside, but in the background: the next prompt starts at once. A picture of "
            "2048 x 2048 otherwise takes a second or more, as long as its two forwards.",
            search_aliases=[
                "save",
                "save image",
                "fast save",
                "async save",
                "background save",
                "export image",
                "png",
            ],
            inputs=[
                io.Image.Input("images", tooltip="The images to save."),
                prefix_input(),
                *saving_inputs(),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images, as they came in.")
            ],
            hidden=HIDDEN,
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> int:
        return failures_of(cls.hidden.unique_id)

    @classmethod
    def execute(
        cls, images, filename_prefix, compress_level=COMPRESS_LEVEL, background=True
    ) -> io.NodeOutput:
        front_end = FrontEnd.of(cls.hidden, NODE_ID)
        saving = Saving.of(cls.hidden, filename_prefix, compress_level, background, front_end)
        saved = save_images(images, saving)
        finish(background, saving)
        warnings = prefix_warnings(filename_prefix)
        report = show_on_node(with_warnings([], warnings), cls.hidden.unique_id, warnings)
        return io.NodeOutput(images, ui={"images": saved, **report})
