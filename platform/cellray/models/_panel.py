"""From the sparse tokens of a cell to a fixed gene panel, and back.

A panel model sees all genes of the vocabulary in vocabulary order, then some specials; its tokens
are the genes that have a value. Genes are found by token id, never by position.

Legend: B cells, T tokens, S places of the panel (genes, then specials), G genes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cellray.core.batch import CellBatch
from cellray.data.vocab import Vocab

__all__ = ["Panel"]

Tensor = torch.Tensor


class Panel:
    """Where the tokens of a vocabulary lie on its panel.

    Args:
        vocab: the gene space; gene i of it is place i.
        specials: specials that follow the genes, in order; those that are no token of the
            vocabulary (None) just take a place.
    """

    def __init__(self, vocab: Vocab, specials: Sequence[str | None]) -> None:
        self.num_genes = len(vocab)
        self.num_places = len(vocab) + len(specials)
        places = torch.full((vocab.num_tokens,), self.num_places, dtype=torch.int64, device="cpu")
        genes = torch.tensor(vocab.gene_tokens.tolist(), dtype=torch.int64, device="cpu")
        places[genes] = torch.arange(len(vocab), device="cpu")
        for number, name in enumerate(specials):
            if name is not None:
                places[vocab.special(name)] = len(vocab) + number
        self._places_V = places

    def places(self, batch: CellBatch) -> Tensor:
        """Place of every token, int64 of ``token_ids``' shape; S for tokens that have none."""
        if self._places_V.device != batch.token_ids.device:
            self._places_V = self._places_V.to(batch.token_ids.device)
        return torch.where(batch.attention_mask, self._places_V[batch.token_ids], self.num_places)

    def flat(self, batch: CellBatch, places: Tensor) -> Tensor:
        """Index into (B * (S + 1)) of every token; column S is for tokens without a place."""
        return batch.token_rows() * (self.num_places + 1) + places

    def spread(self, batch: CellBatch, places: Tensor, values: Tensor) -> Tensor:
        """(B, S): ``values`` of the tokens at their places, 0 elsewhere."""
        dense = values.new_zeros(len(batch) * (self.num_places + 1))
        dense.scatter_(0, self.flat(batch, places).reshape(-1), values.reshape(-1))
        return dense.view(len(batch), -1)[:, : self.num_places]

    def gather(self, panel_BSD: Tensor, batch: CellBatch, places: Tensor) -> Tensor:
        """What a (B, S, D) tensor holds at the tokens, (B, T, D) or packed (P, D).

        Tokens without a place (padding) get the last place's.
        """
        rows = batch.token_rows() * self.num_places + places.clamp(max=self.num_places - 1)
        return panel_BSD.flatten(0, 1)[rows]
