"""The gene space of a model: gene ids, symbols, token ids, specials and corpus medians.

Legend: G genes in the vocabulary, V genes of a store's var table.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cellray.core.errors import DataError

__all__ = ["Vocab", "strip_version"]

_VERSION = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+(_PAR_Y)?$")


def strip_version(gene_id: str) -> str:
    """``ENSG00000141510.18 -> ENSG00000141510``; ``_PAR_Y`` and anything else stays as it is."""
    match = _VERSION.match(gene_id)
    return gene_id if match is None else match.group(1) + (match.group(2) or "")


@dataclass(frozen=True)
class Vocab:
    """An ordered set of genes with their token ids; travels with every saved model.

    Attributes:
        gene_ids: G feature ids (Ensembl ids without version where known, else symbols).
        symbols: G gene symbols, "" where unknown.
        gene_tokens: (G,) int32 token id of each gene.
        specials: token id of each special, e.g. ``{"<pad>": 0, "<mask>": 1}``.
        medians: (G,) float32 corpus-wide non-zero medians of the 10,000-normalised counts, as
            Geneformer needs, or None.
        modalities: G names of what each gene (or peak, or protein) was measured by, or None.
        gene_sets: name -> ascending positions in ``gene_ids`` of its members, in the order a model
            knows the sets, or None.
    """

    gene_ids: tuple[str, ...]
    symbols: tuple[str, ...]
    gene_tokens: npt.NDArray[np.int32]
    specials: Mapping[str, int]
    medians: npt.NDArray[np.float32] | None = None
    gene_sets: Mapping[str, tuple[int, ...]] | None = None
    modalities: tuple[str, ...] | None = None

    @classmethod
    def from_genes(
        cls, gene_ids: Sequence[str], symbols: Sequence[str], *, specials: Sequence[str]
    ) -> Vocab:
        """A new vocabulary: specials take the first token ids, genes follow in order.

        Raises:
            DataError: a gene id occurs twice, or there is none.
        """
        if not gene_ids:
            raise DataError("a vocabulary needs at least one gene; the selection has none")
        if len(set(gene_ids)) != len(gene_ids):
            seen: set[str] = set()
            twice = [g for g in gene_ids if g in seen or seen.add(g)]  # type: ignore[func-returns-value]
            raise DataError(f"gene ids occur twice in the vocabulary: {', '.join(twice[:5])}")
        tokens = np.arange(len(gene_ids), dtype=np.int32) + np.int32(len(specials))
        return cls(
            gene_ids=tuple(gene_ids),
            symbols=tuple(symbols),
            gene_tokens=tokens,
            specials={name: i for i, name in enumerate(specials)},
        )

    def __len__(self) -> int:
        return len(self.gene_ids)

    @property
    def num_tokens(self) -> int:
        """Rows an embedding table over this vocabulary needs."""
        return int(max([int(self.gene_tokens.max()), *self.specials.values()])) + 1

    def special(self, name: str) -> int:
        """Token id of a special.

        Raises:
            DataError: the vocabulary has no such special.
        """
        if name not in self.specials:
            raise DataError(
                f"the vocabulary has no special token '{name}'; it has {sorted(self.specials)}"
            )
        return self.specials[name]

    @property
    def pad(self) -> int:
        """Token id of ``<pad>``."""
        return self.special("<pad>")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over gene ids, token ids, specials, medians, gene sets and modalities."""
        digest = hashlib.sha256()
        digest.update("\n".join(self.gene_ids).encode())
        digest.update(self.gene_tokens.astype("<i4").tobytes())
        digest.update(json.dumps(sorted(self.specials.items())).encode())
        if self.medians is not None:
            digest.update(self.medians.astype("<f4").tobytes())
        if self.gene_sets is not None:
            digest.update(json.dumps(list(self.gene_sets.items())).encode())
        if self.modalities is not None:
            digest.update(json.dumps(self.modalities).encode())
        return digest.hexdigest()

    def with_medians(self, medians: npt.NDArray[np.float32]) -> Vocab:
        """The same vocabulary with corpus medians, (G,) float32."""
        if medians.shape != (len(self),):
            raise DataError(f"{medians.shape} medians given for {len(self)} genes")
        return replace(self, medians=medians.astype(np.float32))

    def with_modalities(self, modalities: Sequence[str]) -> Vocab:
        """The same vocabulary with what each of its G genes was measured by."""
        if len(modalities) != len(self):
            raise DataError(f"{len(modalities)} modalities given for {len(self)} genes")
        return replace(self, modalities=tuple(modalities))

    def with_gene_sets(self, gene_sets: Mapping[str, tuple[int, ...]]) -> Vocab:
        """The same vocabulary with gene sets: name -> positions in ``gene_ids``."""
        return replace(self, gene_sets=dict(gene_sets))

    def only(self, genes: npt.NDArray[np.int64]) -> tuple[Vocab, npt.NDArray[np.int64]]:
        """The vocabulary of some of its genes, with token ids anew: specials, then genes.

        Args:
            genes: (K,) ascending positions in ``gene_ids``.

        Returns:
            The vocabulary, and the old token id of each of its tokens, (num_tokens,).
        """
        chosen = genes.tolist()
        place = {old: new for new, old in enumerate(chosen)}
        specials = sorted(self.specials, key=lambda name: self.specials[name])
        kept = Vocab.from_genes(
            [self.gene_ids[i] for i in chosen],
            [self.symbols[i] for i in chosen],
            specials=specials,
        )
        sets = None
        if self.gene_sets is not None:
            sets = {
                name: tuple(place[i] for i in members if i in place)
                for name, members in self.gene_sets.items()
            }
        kinds = None
        if self.modalities is not None:
            kinds = tuple(self.modalities[i] for i in chosen)
        medians = None if self.medians is None else self.medians[genes]
        tokens = [*(self.specials[name] for name in specials), *self.gene_tokens[genes].tolist()]
        return (
            replace(kept, medians=medians, gene_sets=sets, modalities=kinds),
            np.array(tokens, dtype=np.int64),
        )

    def match(
        self, feature_ids: Sequence[str], symbols: Sequence[str] | None = None
    ) -> npt.NDArray[np.int32]:
        """Vocabulary index of each gene of a store or file, -1 where the vocabulary lacks it.

        Ids are compared without version; a gene whose id is unknown is tried by symbol, in both
        directions, and only if that symbol names one gene on both sides.

        Args:
            feature_ids: V ids.
            symbols: V symbols, optional.

        Returns:
            (V,) int32; no vocabulary gene is given to two rows.
        """
        by_id = {strip_version(g): i for i, g in enumerate(self.gene_ids)}
        given = [strip_version(str(g)) for g in feature_ids]
        result = np.array([by_id.get(g, -1) for g in given], dtype=np.int32)
        by_symbol: dict[str, int] = {}
        ambiguous: set[str] = set()
        for i, symbol in enumerate(self.symbols):
            if symbol and by_symbol.setdefault(symbol, i) != i:
                ambiguous.add(symbol)
        names = [str(s) for s in symbols] if symbols is not None else given
        counts: dict[str, int] = {}
        for name in names:
            counts[name] = counts.get(name, 0) + 1
        taken = set(result[result >= 0].tolist())
        for row in np.flatnonzero(result < 0):
            for name in dict.fromkeys((names[row], given[row])):
                index = by_symbol.get(name, by_id.get(name, -1)) if name not in ambiguous else -1
                if index >= 0 and index not in taken and counts.get(name, 1) == 1:
                    result[row] = index
                    taken.add(index)
                    break
        return result

    def to_dict(self) -> dict[str, object]:
        """JSON-like form, read back by :meth:`from_dict`."""
        return {
            "format": "cellray.vocab.v1",
            "gene_ids": list(self.gene_ids),
            "symbols": list(self.symbols),
            "gene_tokens": self.gene_tokens.tolist(),
            "specials": dict(self.specials),
            "medians": None if self.medians is None else [float(m) for m in self.medians],
            "gene_sets": (
                None if self.gene_sets is None else {k: list(v) for k, v in self.gene_sets.items()}
            ),
            "modalities": None if self.modalities is None else list(self.modalities),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, object]) -> Vocab:
        """The inverse of :meth:`to_dict`.

        Raises:
            DataError: ``raw`` is not a vocabulary of a known format.
        """
        if raw.get("format") != "cellray.vocab.v1":
            raise DataError(f"not a cellray vocabulary: format is {raw.get('format')!r}")
        medians, sets, kinds = raw["medians"], raw.get("gene_sets"), raw.get("modalities")
        return cls(
            gene_ids=tuple(raw["gene_ids"]),  # type: ignore[arg-type]
            symbols=tuple(raw["symbols"]),  # type: ignore[arg-type]
            gene_tokens=np.array(raw["gene_tokens"], dtype=np.int32),
            specials=dict(raw["specials"]),  # type: ignore[call-overload]
            medians=None if medians is None else np.array(medians, dtype=np.float32),
            gene_sets=(
                None if sets is None else {k: tuple(v) for k, v in sets.items()}  # type: ignore[attr-defined]
            ),
            modalities=None if kinds is None else tuple(kinds),  # type: ignore[arg-type]
        )

    def save(self, path: str | Path) -> None:
        """Write ``path`` as gzipped JSON, byte for byte reproducible."""
        data = gzip.compress(json.dumps(self.to_dict()).encode(), mtime=0)
        Path(path).write_bytes(data)

    @classmethod
    def load(cls, path: str | Path) -> Vocab:
        """Read a vocabulary file.

        Raises:
            DataError: the file is missing or is not a vocabulary.
        """
        file = Path(path)
        if not file.is_file():
            raise DataError(f"no vocabulary file at '{path}'")
        try:
            return cls.from_dict(json.loads(gzip.decompress(file.read_bytes())))
        except (OSError, ValueError, KeyError, EOFError, TypeError, zlib.error) as error:
            raise DataError(f"'{path}' is not a cellray vocabulary: {error}") from error
