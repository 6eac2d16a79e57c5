"""Rows as values of an author's type: `fetch(sql, as_=Case)`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, TypeVar, cast

import pydantic
from pydantic.errors import PydanticUserError
from sqlalchemy.orm import DeclarativeBase

from utils.exceptions import ValidationError

T = TypeVar("T")

#: Types whose validators are kept.
TYPES_KEPT = 500
#: Problems that an error lists; the others are counted.
PROBLEMS_SHOWN = 3


def typed_row(cls: type[T], row: Mapping[str, Any]) -> T:
    """Return a row as a pydantic model, a dataclass or a NamedTuple.

    Raises `ValidationError` for a row that does not fit, naming columns and reasons but no values.
    """
    return typed_value(cls, dict(row.items()))


def typed_value(cls: type[T], value: Any) -> T:
    """Return a value as a type that pydantic validates. Raises `ValidationError`."""
    try:
        validated: T = _validator(cast("Hashable", cls)).validate_python(value)
    except pydantic.ValidationError as exc:
        errors = exc.errors(include_url=False, include_context=False, include_input=False)
        shown = [f"{'.'.join(map(str, error['loc'])) or 'the value'}: {error['msg']}" for error in errors]
        more = f" and {len(shown) - PROBLEMS_SHOWN} more" if len(shown) > PROBLEMS_SHOWN else ""
        raise ValidationError(
            f"what was read does not fit {_name(cls)} ({'; '.join(shown[:PROBLEMS_SHOWN])}{more}): select what its"
            " fields need, under their names"
        ) from exc
    return validated


@lru_cache(TYPES_KEPT)
def _validator(cls: Hashable) -> pydantic.TypeAdapter[Any]:
    if isinstance(cls, type) and issubclass(cls, DeclarativeBase):
        raise ValidationError(
            f"as_={_name(cls)}: a table's model is read by a repository, self.repository({_name(cls)})"
        )
    try:
        return pydantic.TypeAdapter(cast("type[Any]", cls))
    except PydanticUserError as exc:
        raise ValidationError(
            f"as_={_name(cls)}: use a pydantic model, a dataclass or a NamedTuple ({exc.message})"
        ) from exc


def _name(cls: object) -> str:
    return getattr(cls, "__name__", None) or repr(cls)
