"""Where a release of the CELLxGENE Census is: ``census:2025-01-30/homo_sapiens`` and the like.

A release is a SOMA collection: ``census_info``, ``census_data/<organism>``. Its organisms are the
experiments a run reads.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any

from cellray.core.errors import ConfigError, DataError, did_you_mean

__all__ = ["RELEASES", "is_census", "locate_census", "organisms"]

RELEASES = "https://census.cellxgene.cziscience.com/cellxgene-census/v1/release.json"
_PREFIX = "census:"
_BUCKET = "s3://cellxgene-census-public-us-west-2/cell-census"
_PUBLIC = {"vfs.s3.region": "us-west-2", "vfs.s3.no_sign_request": "true"}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_ORGANISM = re.compile(r"[a-z]+(_[a-z]+)+")
_KNOWN = ("homo_sapiens", "mus_musculus")
_PATIENCE_S = 20.0


def is_census(uri: str) -> bool:
    """Whether a URI is of the form ``census:...``."""
    return uri.startswith(_PREFIX)


def locate_census(uri: str, *, releases: str = RELEASES) -> tuple[str, dict[str, str]]:
    """Find one organism of a Census release.

    Args:
        uri: ``census:<version>/<organism>``, with the date of a release, which needs no look-up,
            or a name that moves on (``stable``, ``latest``); or ``census:<root>/<organism>`` with
            the folder or object-store address of a copy, the one that holds ``census_data``.
        releases: address of the Census's directory of releases.

    Returns:
        The experiment's URI and the TileDB settings that the public bucket needs: its region, and
        reading without signature. None are needed for a copy.

    Raises:
        ConfigError: not of this form.
        DataError: a name that is not in the directory of releases, or no way to reach that.
    """
    root, _, organism = uri.removeprefix(_PREFIX).rstrip("/").rpartition("/")
    if not root or not _ORGANISM.fullmatch(organism):
        raise ConfigError(
            f"'{uri}' is not of the form census:VERSION/ORGANISM, e.g. "
            f"census:2025-01-30/homo_sapiens or census:stable/mus_musculus."
            f"{did_you_mean(organism, _KNOWN)}"
        )
    if "/" in root:
        return f"{root}/census_data/{organism}", {}
    if _DATE.fullmatch(root):
        return f"{_BUCKET}/{root}/soma/census_data/{organism}", dict(_PUBLIC)
    release = _release(root, releases)
    options = dict(_PUBLIC)
    if release.get("s3_region"):
        options["vfs.s3.region"] = release["s3_region"]
    return f"{release['uri'].rstrip('/')}/census_data/{organism}", options


def _release(name: str, releases: str) -> dict[str, str]:
    """The ``soma`` entry of a release in the directory, names that point to another followed."""
    directory = _directory(name, releases)
    entry: Any = directory.get(name)
    while isinstance(entry, str):  # stable -> 2025-01-30
        entry = directory.get(entry)
    if entry is None:
        newest = sorted((v for v in directory if _DATE.fullmatch(v)), reverse=True)
        names = [n for n, v in directory.items() if isinstance(v, str)]
        raise DataError(
            f"the Census has no release '{name}'.{did_you_mean(name, directory)} It has: "
            f"{', '.join([*names, *newest[:5]])}"
        )
    found: dict[str, str] = entry["soma"]
    return found


def _directory(name: str, releases: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(releases, timeout=_PATIENCE_S) as answer:
            found: dict[str, Any] = json.load(answer)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        raise DataError(
            f"which release of the Census '{name}' is could not be looked up at {releases}: "
            f"{error}. Name a release by its date, e.g. census:2025-01-30/homo_sapiens, or check "
            "the network"
        ) from error
    return found


def organisms(uri: str, names: list[str]) -> str:
    """What to say to a user who named a whole release where one organism is wanted."""
    where = [f"{_PREFIX}{uri.rstrip('/')}/{name}" for name in sorted(names)]
    return f"'{uri}' is a release of the Census; name one of its organisms: {', '.join(where)}"
