"""The data that a configuration names: the cache of `prepare`, or what a family brings along."""

from __future__ import annotations

from ..config import TINY, Config, DataSection
from ..models.load import load_vae
from .batch import Data


def load_data(config: Config) -> Data:
    """The embedded data, or the cache that `turbo-distill prepare` made."""
    if isinstance(config.data, DataSection):
        from .dataset import open_prepared

        return open_prepared(config, config.data)
    from ..tiny.data import embedded_data

    return embedded_data(load_vae(TINY), config.seed)
