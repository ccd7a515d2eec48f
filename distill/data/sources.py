"""Real images with captions: folders, WebDataset shards, folders of Hugging Face datasets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config import ConfigError
from .archive import ARCHIVE_SUFFIXES, Archive, is_archive
from .files import list_files
from .folder import Folder
from .huggingface import Dataset, is_saved, parquet_files
from .metadata import Metadata, metadata_file
from .sample import ImageSource


def open_images(path: Path, key: str | None = None, cache: Path | None = None) -> list[ImageSource]:
    """The sources at `path`, but for the folder `cache`; what does not exist as it is written may
    be a name with wildcards.

    Raises ConfigError if there is none.
    """
    if not path.exists() and any(letter in path.name for letter in "*?["):
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise ConfigError(f"data.images: no file matches {path}.")
        return [source for match in found for source in open_images(match, key, cache)]
    if not path.exists():
        raise ConfigError(
            f"data.images: {path} does not exist. Expected a folder of images with .txt captions, "
            "WebDataset shards (.tar, .tar.gz) or a folder of Hugging Face datasets."
        )
    if not path.is_dir():
        if not path.is_file() or not is_archive(path.name):
            raise ConfigError(
                f"data.images: {path}: expected a folder or an archive "
                f"({', '.join(ARCHIVE_SUFFIXES)}), found a file of another kind."
            )
        return [Archive(path, key)]
    listing = list_files(path, cache)
    archives = [name for name in listing.files if is_archive(name)]
    if not any("/" not in name for name in archives):
        if metadata_file(path) and not is_saved(path):
            return [Metadata(path, listing, key)]
        if is_saved(path) or parquet_files(path):
            return [Dataset(path, listing, key)]
    loose = {name: status for name, status in listing.files.items() if not is_archive(name)}
    folder = Folder(path, replace(listing, files=loose), key)
    if not archives:
        folder.require_pictures()
    sources: list[ImageSource] = [Archive(path / name, key) for name in archives]
    return sources + [folder] * bool(loose or listing.refused or not archives)
