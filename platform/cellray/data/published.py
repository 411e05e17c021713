"""The published benchmark files that are known: what each holds, where it is looked for, its hash.

The table (``published.toml``) is written after public code and text that use the files. No
published file was at hand: the loaders were tried on small files made in the same layout.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.core.section import Section, build_section, read_toml

__all__ = [
    "FOLDER_VARIABLE",
    "Published",
    "PublishedFile",
    "check_hash",
    "default_folder",
    "known",
    "listing",
    "locate",
    "published",
    "read_pins",
]

FOLDER_VARIABLE = "CELLRAY_DATA"
_TABLE = Path(__file__).with_name("published.toml")
_CHUNK_BYTES = 8 << 20


class PublishedFile(Section):
    """One file of a set.

    Attributes:
        name: its path below the folder.
        also: other paths it is known under.
        part: ``train`` or ``test``; "" if it holds both or is not split.
        cells: cells it holds; 0: not known. Likewise ``genes`` and ``classes`` (label values).
        sha256: of the file; "" if none was published.
        md5: likewise, as the file's host states it.
    """

    name: str
    also: list[str] = []
    part: Literal["train", "test", ""] = ""
    cells: int = Field(default=0, ge=0)
    genes: int = Field(default=0, ge=0)
    classes: int = Field(default=0, ge=0)
    sha256: str = ""
    md5: str = ""


class Published(Section):
    """One set.

    Attributes:
        title: what it is.
        doi: of the paper that the cells come from.
        source: where the files are to be had.
        files: the files it consists of.
        layout: ``h5ad``, or ``10x``: matrix.mtx, genes.tsv, barcodes.tsv and the annotation.
        label: obs columns that may hold the cell types, the first one there is taken; likewise
            ``batch`` and ``donor``, which may be missing.
        layers: layers that may hold the counts, in order; ``X`` and ``raw.X`` are tried last.
        organism: whose genes.
        task: the task the set is used for.
        split_id: name of the split, under which tables show reported values.
        test_fraction: share of the cells of each class that is the test set, for a set whose files
            do not say.
        note: what a user must know.
    """

    title: str
    doi: str
    source: str
    files: list[PublishedFile] = Field(min_length=1)
    layout: Literal["h5ad", "10x"] = "h5ad"
    label: list[str]
    batch: list[str] = []
    donor: list[str] = []
    layers: list[str] = []
    organism: Literal["human", "mouse"]
    task: str = "annotation"
    split_id: str
    test_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    note: str = ""

    @property
    def is_split(self) -> bool:
        """Whether there are training and test cells."""
        return self.test_fraction > 0 or any(file.part for file in self.files)


@cache
def known() -> Mapping[str, Published]:
    """Every set of the table, by name."""
    raw = read_toml(_TABLE)
    return {name: build_section(Published, table, source=name) for name, table in raw.items()}


def published(name: str) -> Published:
    """A set of the table.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in known():
        raise ConfigError(
            f"no published set '{name}'.{did_you_mean(name, known())} Known: {', '.join(known())}"
        )
    return known()[name]


def default_folder() -> Path | None:
    """``$CELLRAY_DATA/published``; None if the variable is not set."""
    root = os.environ.get(FOLDER_VARIABLE, "")
    return Path(root) / "published" if root else None


def _places(name: str, file: PublishedFile, folder: Path) -> list[Path]:
    bare = Path(file.name).name
    paths = [file.name, *file.also, f"{name}/{bare}", bare]
    return [folder / path for path in dict.fromkeys(paths)]


def locate(name: str, folder: Path) -> list[Path]:
    """Where each file of a set lies.

    Raises:
        DataError: a file is at none of the places it is looked for at.
    """
    entry, found = published(name), []
    for file in entry.files:
        places = _places(name, file, folder)
        there = next((place for place in places if place.is_file()), None)
        if there is None:
            shown = ", ".join(str(place) for place in places)
            raise DataError(
                f"'{name}' is not present: no file at {shown}. It is to be had from {entry.source}"
            )
        found.append(there)
    return found


def read_pins(path: str | Path) -> dict[str, str]:
    """The hashes that a user has pinned: ``[published.sha256]`` of a TOML file.

    Raises:
        ConfigError: the file cannot be read, or the table holds something else.
    """
    table = read_toml(path).get("published", {})
    pins = table.get("sha256", {}) if isinstance(table, dict) else None
    if not isinstance(pins, dict) or not all(isinstance(v, str) for v in pins.values()):
        raise ConfigError(
            f"{path}: write hashes as [published.sha256] with lines \"ms/c_data.h5ad\" = '...'"
        )
    names = {file.name for entry in known().values() for file in entry.files}
    for name in pins:
        if name not in names:
            raise ConfigError(
                f"{path}: published.sha256 pins '{name}', which is no published file."
                f"{did_you_mean(name, names)} Known: {', '.join(sorted(names))}"
            )
    return pins


def _digests(path: Path) -> tuple[str, str]:
    """(SHA-256, MD5) of a file."""
    sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha.update(chunk)
            md5.update(chunk)
    return sha.hexdigest(), md5.hexdigest()


@dataclass(frozen=True)
class HashCheck:
    """A file's hash and what it was held against.

    Attributes:
        sha256: the file's.
        lines: what to tell the user.
    """

    sha256: str
    lines: tuple[str, ...]


def check_hash(file: PublishedFile, path: Path, pins: Mapping[str, str]) -> HashCheck:
    """Hold a file against the hash that was pinned, else against the published one.

    Args:
        file: what the table says.
        path: the file.
        pins: from :func:`read_pins`; a pin goes before the table.

    Raises:
        DataError: it is another file; names both hashes.
    """
    sha, md5 = _digests(path)
    pinned = pins.get(file.name, "")
    wanted, kind, of = pinned or file.sha256, "SHA-256", "pinned" if pinned else "published"
    found = sha
    if not wanted and file.md5:
        wanted, kind, found = file.md5, "MD5", md5
    if not wanted:
        pin = f'[published.sha256]\n"{file.name}" = "{sha}"'
        lines = (f"{path}: no published hash is known; to pin what you have:", *pin.split("\n"))
        return HashCheck(sha, lines)
    if wanted.lower() != found:
        raise DataError(
            f"'{path}' is not the {of} file: its {kind} is {found}, {of} is {wanted.lower()}. "
            "Get the file again, or, if you trust it, pin its SHA-256: [published.sha256] "
            f'"{file.name}" = "{sha}"'
        )
    return HashCheck(sha, (f"{path}: {kind} {found[:12]} is the {of} one",))


def listing(folder: Path | None) -> list[str]:
    """Every known set, and whether its files are there; never an error."""
    where = str(folder) if folder else f"nowhere: ${FOLDER_VARIABLE} is not set; give --folder"
    lines = [f"published files are looked for in {where}"]
    for name, entry in known().items():
        sizes = " + ".join(f"{file.cells:,}" for file in entry.files)
        what = f"  {sizes} cells, task {entry.task}, split {entry.split_id}"
        lines += ["", f"{name}: {entry.title}", what]
        for file in entry.files:
            places = [] if folder is None else _places(name, file, folder)
            there = next((place for place in places if place.is_file()), None)
            lines.append(
                f"  present: {there}" if there else f"  not present: {file.name} ({entry.source})"
            )
        lines += [f"  {entry.note}"] if entry.note else []
    return lines
