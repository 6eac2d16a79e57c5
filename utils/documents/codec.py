"""Models as JSON text that PostgreSQL can store, and back; what does not fit any more is repaired by its defaults."""

from __future__ import annotations

import json
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError

from utils.text import scrub_payload, storable

T = TypeVar("T", bound=BaseModel)

#: Bytes of a value as JSON: a document is read and written whole.
MAX_BYTES = 2**20
#: Rounds of dropping what does not fit; each may uncover what did not fit behind it.
_ROUNDS = 50
#: Faults that a message names; the rest is counted.
_NAMED = 3


class Misfit(ValueError):
    """A value does not fit its model, or cannot be stored; the message says what is wrong with it."""


class Codec(Generic[T]):
    """Turns one model into JSON text and back.

    Fields go by their names, whatever aliases they have; computed ones are left out. NUL and lone surrogates, which
    `jsonb` has not, become U+FFFD. Numbers that are not finite are refused, but where a field has no type of its own
    (`Any`) pydantic makes them null.
    """

    def __init__(self, model: type[T]) -> None:
        self.model: type[T] = model

    def encode(self, value: T) -> str:
        """Return the JSON of a value. Raises `Misfit` for what could not be read again, and for more than 1 MB."""
        try:
            try:
                plain = self._plain(value)
            except UnicodeEncodeError:  # pydantic takes lone surrogates in values, but not in keys
                fields = _storable_keys(value.model_dump(by_alias=False, round_trip=True, warnings=False))
                plain = self._plain(self.model.model_validate(fields, by_alias=False, by_name=True))
            text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except ValidationError as exc:
            raise Misfit(_told(exc)) from exc
        except (PydanticSerializationError, ValueError, TypeError, RecursionError) as exc:
            raise Misfit(f"it is no JSON ({exc})") from exc
        size = len(text.encode())
        if size > MAX_BYTES:
            raise Misfit(f"it has {size:,} bytes as JSON, more than {MAX_BYTES:,}: split it over several keys")
        self.decode(text)
        return text

    def decode(self, text: str) -> T:
        """Return the value of a JSON text. Raises `Misfit`."""
        try:
            return self.model.model_validate_json(text, by_alias=False, by_name=True)
        except ValidationError as exc:
            raise Misfit(_told(exc)) from exc

    def default(self) -> T:
        """Return the model with nothing but defaults. Raises `Misfit` when fields have none."""
        try:
            return self.model()
        except ValidationError as exc:
            raise Misfit(_told(exc)) from exc

    def repair(self, text: str) -> tuple[str, T] | None:
        """Drop the smallest parts that do not fit and can be missing; return the new text and value.

        None: it does not fit without them either.
        """
        plain = json.loads(text)
        for _ in range(_ROUNDS):
            try:
                return text, self.model.model_validate_json(text, by_alias=False, by_name=True)
            except ValidationError as exc:
                paths = {_found(plain, error) for error in exc.errors(include_url=False, include_context=False)}
            if () in paths:
                return None
            for path in sorted(paths, reverse=True):  # from behind, so that the other indexes of a list stay
                _drop(plain, path)
            text = json.dumps(plain, ensure_ascii=False)
        return None

    def _plain(self, value: T) -> Any:
        return scrub_payload(value.model_dump(mode="json", by_alias=False, round_trip=True, warnings=False))


def _told(exc: ValidationError) -> str:
    """Return the faults in one line, without the values: they may be anybody's."""
    faults = exc.errors(include_url=False, include_context=False, include_input=False)
    named = [f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}" for fault in faults[:_NAMED]]
    more = [f"{len(faults) - _NAMED} more"] if len(faults) > _NAMED else []
    return storable("; ".join([*named, *more]))


def _found(plain: Any, error: ErrorDetails) -> tuple[Any, ...]:
    """Return how far a fault's path leads into a value: beyond it stand what is missing, and pydantic's own words."""
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
