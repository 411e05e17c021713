"""Typed, frozen, strict configuration sections and how a TOML file becomes one.

A run's configuration is a tree of :class:`Section` objects. Most have a fixed type; a *plugged*
section (tokenizer, model, objective ...) gets its type from the unit of extension that its key
names, so that each unit keeps its configuration in its own file. Everything goes TOML -> JSON ->
strict validation: strict mode on Python objects would refuse paths and tuples.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from cellray.core.errors import ConfigError, did_you_mean

__all__ = [
    "MAX_SEED",
    "Section",
    "apply_overrides",
    "build_section",
    "flatten",
    "merge",
    "parse_value",
    "read_toml",
    "to_dict",
    "to_toml",
]

MAX_SEED = (1 << 32) - 1  # the largest that every library takes


class Section(BaseModel):
    """One table of a configuration: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


S = TypeVar("S", bound=Section)
# Given the run's raw dictionary, the concrete type of each plugged field.
Plugs = Callable[[dict[str, Any]], Mapping[str, type[Section]]]


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is a folder or is not valid TOML.
    """
    file = Path(path)
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        there = f" In {file.parent}: {', '.join(near)}." if near else ""
        hint = did_you_mean(file.name, near)
        raise ConfigError(f"no configuration file at '{path}'.{hint}{there}")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}") from error


def parse_value(text: str) -> Any:
    """Read the right side of ``key=value`` as TOML would; a bare word is a string.

    ``2e-4`` -> float, ``true`` -> bool, ``[1, 2]`` -> list, ``scgpt`` -> str.
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``raw`` with every ``section.key=value`` of ``overrides`` set.

    Raises:
        ConfigError: an override has no ``=``, an empty key, or walks through a plain value.
    """
    result: dict[str, Any] = json.loads(json.dumps(raw))
    for item in overrides:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"override '{item}' is not of the form section.key=value, e.g. optim.lr=2e-4"
            )
        node = result
        for part in parts[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override '{item}': '{part}' is a value, not a section")
        node[parts[-1]] = parse_value(text.strip())
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the tables of ``over`` laid on top, key by key."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def _section_type(annotation: Any) -> type[Section] | None:
    """The Section class inside ``X`` or ``X | None``; None for plain values."""
    if get_origin(annotation) is dict:
        return None
    options = getattr(annotation, "__args__", ()) or (annotation,)
    found = [a for a in options if isinstance(a, type) and issubclass(a, Section)]
    return found[0] if found else None


def _named_sections(annotation: Any) -> type[Section] | None:
    """The Section class of ``dict[str, X]``: tables with names of the user's choice."""
    if get_origin(annotation) is not dict:
        return None
    return _section_type(get_args(annotation)[1])


def _unknown_keys(cls: type[Section], raw: Mapping[str, Any], path: str) -> list[str]:
    problems = []
    for key, value in raw.items():
        where = f"{path}{key}"
        if key not in cls.model_fields:
            allowed = sorted(cls.model_fields)
            problems.append(
                f"unknown key '{where}'.{did_you_mean(key, allowed)} Allowed here: "
                f"{', '.join(allowed)}"
            )
            continue
        named = _named_sections(cls.model_fields[key].annotation)
        if named is not None and isinstance(value, Mapping):
            for name, table in value.items():
                if isinstance(table, Mapping):
                    problems += _unknown_keys(named, table, f"{where}.{name}.")
            continue
        inner = _section_type(cls.model_fields[key].annotation)
        if inner is not None and isinstance(value, Mapping):
            problems += _unknown_keys(inner, value, f"{where}.")
    return problems


# What pydantic calls the branches of a key that may be of several types.
_BRANCH = re.compile(r"constrained-\w+|literal\[.*\]|list\[.*\]|dict\[.*\]|int|float|str|bool|none")


def _explain(error: ValidationError) -> list[str]:
    lines = []
    tried: dict[str, list[str]] = {}  # a key that may be of several types: what each wants
    for item in error.errors():
        *before, last = item["loc"] or ("",)
        if before and _BRANCH.fullmatch(str(last)):
            where = ".".join(map(str, before))
            wanted = tried.setdefault(f"{where} = {json.dumps(item['input'], default=str)}", [])
            wanted.append(item["msg"])
            continue
        where = ".".join(str(part) for part in item["loc"]) or "(whole run)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"'{where}' is missing")
        elif item["type"] == "value_error":
            lines.append(message if where == "(whole run)" else f"{where}: {message}")
        else:
            given = json.dumps(item["input"], default=str)
            lines.append(f"{where} = {given} is not allowed: {message}")
    alternatives = (f"{key} is not allowed: {'; or: '.join(w)}" for key, w in tried.items())
    return [*lines, *alternatives]


def _with_types(cls: type[S], types: Mapping[str, type[Section]]) -> type[S]:
    """A subclass of ``cls`` whose plugged fields have their concrete types."""
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
    made: type[S] = create_model(cls.__name__, __base__=cls, __module__=cls.__module__, **fields)
    return made


def build_section(
    cls: type[S], raw: Mapping[str, Any], *, plugs: Plugs | None = None, source: str = ""
) -> S:
    """Validate ``raw`` into ``cls``, collecting every problem into one message.

    Args:
        cls: the section to build.
        raw: JSON-like dictionary.
        plugs: gives the concrete type of the plugged fields for this ``raw``.
        source: where ``raw`` came from, for the message.

    Raises:
        ConfigError: unknown keys (with the nearest allowed one), wrong types, or a cross-field
            rule that does not hold.
    """
    plain = json.loads(json.dumps(raw, default=str))
    concrete = cls if plugs is None else _with_types(cls, plugs(plain))
    prefix = f"{source}: " if source else ""
    problems = _unknown_keys(concrete, plain, "")
    if problems:
        raise ConfigError(prefix + "; ".join(problems))
    try:
        return concrete.model_validate_json(json.dumps(plain))
    except ValidationError as error:
        raise ConfigError(prefix + "; ".join(_explain(error))) from error


def to_dict(section: Section) -> dict[str, Any]:
    """The section as JSON-like values, ready for a file, MLflow or a worker."""
    result: dict[str, Any] = json.loads(section.model_dump_json(serialize_as_any=True))
    return result


def flatten(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"optim": {"lr": 1}} -> {"optim.lr": 1}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(k)} = {_toml_value(v)}" for k, v in value.items())
        return "{ " + inner + " }" if inner else "{}"
    return repr(value)


def to_toml(raw: Mapping[str, Any], prefix: str = "") -> str:
    """Write JSON-like tables as TOML; keys whose value is None are left out (their default)."""
    plain = {k: v for k, v in raw.items() if v is not None and not isinstance(v, Mapping)}
    tables = {k: v for k, v in raw.items() if isinstance(v, Mapping)}
    bare = {k: (k if k.replace("_", "").replace("-", "").isalnum() else json.dumps(k)) for k in raw}
    lines = [f"{bare[k]} = {_toml_value(v)}" for k, v in plain.items()]
    for key, value in tables.items():
        name = f"{prefix}{bare[key]}"
        inner = to_toml(value, f"{name}.")
        lines += ["", f"[{name}]", inner] if inner or not value else []
    return "\n".join(lines)
