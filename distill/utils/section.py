"""Sections of a configuration, and the types of values that people write by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from .values import SEED_MAX, readable, storable, user_path, with_home
from .yaml12 import Written

Text = Annotated[str, AfterValidator(readable)]
UserPath = Annotated[
    Path,
    BeforeValidator(lambda v: user_path(v) if isinstance(v, str | Path) else v),
    AfterValidator(storable),
]
ModelPath = Annotated[  # a folder, a hub id, or a name that stands for something of ours
    str, Field(min_length=1), AfterValidator(with_home)
]
Seed = Annotated[int, Field(ge=0, le=SEED_MAX)]


class Section(BaseModel):
    """A mapping in a configuration: frozen, an unknown key is an error, and so is a number that is
    not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _by_type(cls, values: Any) -> Any:
        """Decides for every key whether it is given the text that was written or YAML's value."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: meant(value, classes(fields[key].annotation)) if key in fields else value
            for key, value in values.items()
        }


def meant(value: Any, kinds: frozenset[type]) -> Any:
    """What a written value is for a key whose type is made of `kinds`; others stay as they are."""
    if isinstance(value, list):
        return [meant(item, kinds) for item in value]
    if not isinstance(value, Written):
        return value
    yaml = value.value
    if isinstance(yaml, list) and tuple in kinds:
        return meant(yaml, kinds)
    if yaml is None and type(None) in kinds:
        return None
    if kinds & {str, Path} or (isinstance(yaml, bool) and bool not in kinds):
        return str(value)
    return yaml


def classes(annotation: Any) -> frozenset[type]:
    """The classes that a type is made of: tuple, Path and NoneType of `tuple[Path, ...] | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return frozenset({annotation})
    own = {tuple} if get_origin(annotation) is tuple else set()
    return frozenset(own).union(*map(classes, get_args(annotation)))
