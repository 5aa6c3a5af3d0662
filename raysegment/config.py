"""Strict loading of configurations: a mapping becomes a frozen dataclass, unknown keys fail and suggest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import dacite
import yaml

from raysegment.climate.checks import BadInput

T = TypeVar("T")
_BOOL, _INT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int"
_WHOLE = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$")  # as YAML 1.1, but for the base of 60


class _Loader(yaml.SafeLoader):
    """With YAML 1.2's booleans, true and false: `off` and `no` are words, as in checkpoint.memory=off. And with its whole
    numbers: 2:32 is no number to the base of 60."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern if tag != _INT else _WHOLE) for tag, pattern in known if tag != _BOOL]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; BadInput when there is no file or no mapping in it."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(path, "a YAML configuration file", "no such file", "Give the path of a configuration.")
    try:
        content = yaml.load(path.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        raise BadInput(path, "valid YAML", str(error).replace("\n", " "), "Correct the file.") from error
    if not isinstance(content, dict):
        raise BadInput(path, "keys with values", type(content).__name__, "Write lines like `steps: 1000`.")
    return content


def apply_overrides(mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with every `a.b=value` of `overrides` set; values are read as YAML (numbers, true, lists)."""
    result = _copy(mapping)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise BadInput(override, "key=value", override, "Write for example `optim.lr=1e-3`.")
        _set(result, key.split("."), scalar(value))
    return result


def load(cls: type[T], mapping: Mapping[str, Any], where: str | Path = "configuration") -> T:
    """An instance of the dataclass `cls` from nested mappings; BadInput names the key that does not fit."""
    _refuse_unknown(cls, mapping, "", where)
    try:
        return dacite.from_dict(cls, mapping, dacite.Config(strict=True, cast=[float, tuple]))
    except dacite.DaciteError as error:
        raise BadInput(where, f"values that fit {cls.__name__}", error, "See the README's table of keys.") from error
    except BadInput:
        raise
    except (ValueError, TypeError) as error:
        raise BadInput(where, f"values that fit {cls.__name__}", error, "Correct the value.") from error


def _set(mapping: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        mapping = mapping.setdefault(part, {})
        if not isinstance(mapping, dict):
            raise BadInput(".".join(path), "a group of keys", f"the value {mapping!r} at `{part}`", "Drop the dot.")
    mapping[path[-1]] = value


def scalar(text: str) -> Any:
    """YAML's reading of a value, and `1e-3` as the number it is (YAML 1.1 wants `1.0e-3`)."""
    value = yaml.load(text, _Loader)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _copy(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else _number(value) for key, value in mapping.items()}


def _number(value: Any) -> Any:
    return scalar(value) if isinstance(value, str) and value[:1] in "+-.0123456789" and "e" in value.lower() else value


def _refuse_unknown(cls: type, mapping: Mapping[str, Any], prefix: str, where: str | Path) -> None:
    hints = get_type_hints(cls)
    known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
    for key, value in mapping.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            remedy = f"Did you mean `{prefix}{close[0]}`?" if close else f"Known keys: {', '.join(known)}."
            raise BadInput(where, f"keys of {cls.__name__}", f"`{prefix}{key}`", remedy)
        inner = next((t for t in (hints[key], *get_args(hints[key])) if is_dataclass(t)), None)
        if inner is not None and isinstance(value, Mapping):
            _refuse_unknown(inner, value, f"{prefix}{key}.", where)  # pyright: ignore[reportArgumentType]
