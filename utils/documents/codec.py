"""Converts pydantic models to JSON text for `jsonb` and back, and repairs JSON that no longer fits its model."""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from utils.text import scrub_payload, storable

T = TypeVar("T", bound=BaseModel)

#: Maximum size of a value as JSON, in bytes: a document is always read and written as a whole.
MAX_BYTES = 2**20
#: Maximum number of repair passes. Removing one invalid part can reveal another.
_MAX_PASSES = 50
#: Number of validation errors listed in a message; the others are counted.
_MAX_LISTED = 3


class InvalidDocument(ValueError):
    """A value does not fit its model or cannot be stored. The message names the fields and the reasons."""


class Codec(Generic[T]):
    """Converts values of one model to JSON text and back.

    Fields are stored under their names, not their aliases; computed fields are omitted. NUL and lone surrogates, which
    `jsonb` cannot store, become U+FFFD. NaN and infinity are rejected, except in fields of type `Any`, where pydantic
    serializes them as null.
    """

    def __init__(self, model: type[T]) -> None:
        self.model: type[T] = model

    def encode(self, value: T) -> str:
        """Return a value as JSON text. Raises `InvalidDocument` if it cannot be read back or is larger than 1 MB."""
        if not isinstance(value, BaseModel):
            raise InvalidDocument(f"it is a {type(value).__name__}, not a {self.model.__name__}")
        try:
            try:
                plain = self._plain(value)
            except UnicodeEncodeError:  # pydantic accepts lone surrogates in values, but not in keys
                fields = _storable_keys(value.model_dump(by_alias=False, round_trip=True, warnings=False))
                plain = self._plain(self.model.model_validate(fields, by_alias=False, by_name=True))
            text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValidationError as exc:
            raise InvalidDocument(_describe(exc)) from exc
        except (PydanticSerializationError, ValueError, TypeError, RecursionError) as exc:
            raise InvalidDocument(f"it cannot be represented as JSON ({exc})") from exc
        size = len(text.encode())
        if size > MAX_BYTES:
            raise InvalidDocument(
                f"it has {size:,} bytes as JSON, the maximum is {MAX_BYTES:,}: split it over several keys"
            )
        self.decode(text)
        return text

    def decode(self, text: str) -> T:
        """Return the value of a JSON text. Raises `InvalidDocument` if it does not fit the model."""
        try:
            return self.model.model_validate_json(text, by_alias=False, by_name=True)
        except ValidationError as exc:
            raise InvalidDocument(_describe(exc)) from exc

    def default(self) -> T:
        """Return the model with all defaults. Raises `InvalidDocument` if a field has none."""
        try:
            return self.model()
        except ValidationError as exc:
            raise InvalidDocument(_describe(exc)) from exc

    def repair(self, text: str) -> tuple[str, T] | None:
        """Remove the smallest invalid parts, so that their defaults apply, and return the new text and value.

        Returns None if the rest does not fit the model either.
        """
        plain = json.loads(text)
        for _ in range(_MAX_PASSES):
            try:
                return text, self.model.model_validate_json(text, by_alias=False, by_name=True)
            except ValidationError as exc:
                paths = {_existing_path(plain, error) for error in exc.errors(include_url=False, include_context=False)}
            if () in paths:
                return None
            for path in sorted(paths, reverse=True):  # last index first, so that the indexes of a list stay valid
                _drop(plain, path)
            text = json.dumps(plain, ensure_ascii=False)
        return None

    def _plain(self, value: T) -> Any:
        return scrub_payload(value.model_dump(mode="json", by_alias=False, round_trip=True, warnings=False))


def _describe(exc: ValidationError) -> str:
    """Describe the validation errors in one line, without values: they may be personal data."""
    errors = exc.errors(include_url=False, include_context=False, include_input=False)
    listed = [f"{'.'.join(map(str, error['loc'])) or 'document'}: {error['msg']}" for error in errors[:_MAX_LISTED]]
    more = [f"{len(errors) - _MAX_LISTED} more"] if len(errors) > _MAX_LISTED else []
    return storable("; ".join([*listed, *more]))


def _existing_path(plain: Any, error: ErrorDetails) -> tuple[Any, ...]:
    """Return the part of an error's path that exists in the value; pydantic appends missing keys and type names."""
    path: list[int | str] = []
    for step in error["loc"]:
        is_item = isinstance(plain, list) and isinstance(step, int) and 0 <= step < len(plain)
        if not is_item and not (isinstance(plain, dict) and step in plain):
            break
        plain = plain[step]
        path.append(step)
    return tuple(path)


def _drop(plain: Any, path: tuple[Any, ...]) -> None:
    *steps, last = path
    for step in steps:
        plain = plain[step]
    del plain[last]


def _storable_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {storable(k) if isinstance(k, str) else k: _storable_keys(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_storable_keys(item) for item in value]
    return value
