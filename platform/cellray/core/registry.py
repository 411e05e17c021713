"""Units of extension found by listing a package: the module's name is its key.

A folder such as ``cellray.models`` holds one unit a file; each module exports one object under an
agreed name (``FAMILY``, ``TASK``, ``BASELINE`` ...). Nothing is listed centrally, and a dotted
``my_lab.mymodel:FAMILY`` works the same from outside the repository.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from cellray.core.errors import ConfigError, did_you_mean

__all__ = ["find", "names"]

_NOT_UNITS = frozenset({"base", "upstream"})


def names(package: str) -> list[str]:
    """The keys of the units in ``package`` (e.g. ``"cellray.models"``), sorted."""
    path = importlib.import_module(package).__path__
    found = [m.name for m in pkgutil.iter_modules(path)]
    return sorted(n for n in found if n not in _NOT_UNITS and not n.startswith("_"))


def find(package: str, name: str, attribute: str) -> Any:
    """Return the object ``attribute`` of the unit ``name``.

    Args:
        package: the package that lists the units, e.g. ``"cellray.models"``.
        name: a key of that package, or ``"module.path:OBJECT"`` for a unit from elsewhere.
        attribute: the agreed name, e.g. ``"FAMILY"``.

    Raises:
        ConfigError: there is no such unit, or its module does not export ``attribute``.
    """
    module_name, colon, other = name.partition(":")
    if not colon:
        allowed = names(package)
        if name not in allowed:
            kind = package.rpartition(".")[2]
            raise ConfigError(
                f"no '{name}' in {kind}.{did_you_mean(name, allowed)} Allowed: "
                f"{', '.join(allowed)}, or 'module.path:{attribute}' for your own"
            )
        module_name = f"{package}.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import '{module_name}' for '{name}': {error}") from error
    wanted = other or attribute
    if not hasattr(module, wanted):
        raise ConfigError(f"module '{module_name}' exports no '{wanted}'")
    return getattr(module, wanted)
