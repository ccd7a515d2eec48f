"""The data that a configuration names: the cache of `prepare`, or what a family brings along."""

from __future__ import annotations

from dataclasses import replace

from ..config import Config, DataSection
from ..contract.spec import TurboSpec
from ..models.family import family_of
from .batch import Data
from .dataset import PreparedData, open_prepared


def load_data(config: Config) -> Data:
    """The cache that `turbo-distill prepare` made, or the embedded data."""
    if isinstance(config.data, DataSection):
        return open_prepared(config, config.data)
    embedded = family_of(config.model.path).embedded
    assert embedded is not None  # the configuration was checked
    return embedded.data(config.seed)


def with_trained_sizes(spec: TurboSpec, config: Config, data: Data) -> TurboSpec:
    """The spec with the sizes of which the data has images, unless the recipe lists some."""
    if config.spec.resolutions or not isinstance(data, PreparedData):
        return spec
    return replace(spec, resolutions=data.trained_sizes)
