"""Settings: frozen dataclasses read from TOML, where a mistake is one clear error.

An unknown key, a wrong type or a value out of range is a `UserError` that names the key and the
nearest valid one.
"""

import dataclasses
import functools
import json
import tomllib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from recsys_compress.errors import UserError, nearest

T = TypeVar("T")

# JSON's strict mode takes a list for a tuple and an integer for a float, and nothing else.
STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def parse(kind: type[T], raw: Mapping[str, Any], *, where: str) -> T:
    """Builds a settings dataclass from parsed TOML.

    Args:
        kind: the dataclass; fields it does not have and values of other types are refused.
        raw: the parsed TOML.
        where: file or key that messages begin with.

    Raises:
        UserError: the first thing that is wrong, with the mend.
    """
    try:
        found: T = _adapter(kind).validate_json(json.dumps(raw, default=str))  # type: ignore[arg-type]
        return found
    except ValidationError as error:
        raise _explained(kind, error, where) from None


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    """Returns what checks a dataclass; to make it takes far longer than to use it."""
    return TypeAdapter(kind)


def merged(raw: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `raw` with the values of `over` laid over it, section by section."""
    found = dict(raw)
    for key, value in over.items():
        below = found.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = merged(below, value)
        found[key] = value
    return found


def overridden(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Returns `raw` with each `key=value` applied; a value is TOML, or else a plain string."""
    result = dict(raw)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {override!r}: write it as key=value, like train.seed=1")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.strip().split(".")):
            value = {part: value}
        result = merged(result, value)
    return result


def _explained(kind: type, error: ValidationError, where: str) -> UserError:
    """Returns one line for one fault: an unknown key, since others may follow from it, or any."""
    unknown = ("unexpected_keyword_argument", "extra_forbidden")
    fault = min(error.errors(include_url=False), key=lambda f: f["type"] not in unknown)
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    own = fault.get("ctx", {}).get("error")  # of the dataclass itself
    if isinstance(own, UserError):
        return own  # names its place
    if isinstance(own, ValueError):
        said = f"{key}: {own}"
    elif fault["type"] in unknown:
        said = f"unknown key {key!r}; {nearest(path[-1], _keys(kind, path[:-1]))}"
    elif fault["type"] in ("missing", "missing_argument"):
        said = f"key {key!r} is missing; add it"
    elif path[-1:] == ["str"]:  # of sizes, which are text or whole numbers
        size = ".".join(path[:-1])
        said = f"{size} = {fault['input']!r}: write '0.1x' or '2MB', or a whole number of bytes"
    else:
        said = f"{key} = {fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
    return UserError(f"{where}: {said}")


def _keys(kind: type, path: list[str]) -> list[str]:
    """Returns the field names of the dataclass at `path` inside `kind`."""
    for part in path:
        hint = typing.get_type_hints(kind).get(part)
        if hint is None and part.isdigit():
            continue
        inner = [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]
        kind = inner[0] if inner else hint  # type: ignore[assignment]
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def without_none(value: Any) -> Any:
    """Returns plain data without the keys whose value is None, which TOML does not have."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(v) for v in value]
    return value
