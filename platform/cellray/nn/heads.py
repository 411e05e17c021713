"""What stands on an encoder: decoders of genes and values, classifiers of cells.

Legend: B cells, D width, M target tokens of a batch (laid end to end), G genes, V vocabulary
tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from cellray.nn.norm import RowNorm

__all__ = [
    "CellGeneDecoder",
    "ExpressionDecoder",
    "GeneAxisClassifier",
    "MlpClassifier",
    "NormedClassifier",
    "PooledClassifier",
    "TiedTokenDecoder",
    "TokenClassifier",
]

Tensor = torch.Tensor


class TiedTokenDecoder(nn.Module):
    """BERT's masked-token head: dense, ReLU, norm, then the token table itself with a bias.

    Args:
        num_tokens: V.
        width: D.
        activation: module between dense and norm.
        layer_norm_eps: epsilon of the norm.
    """

    def __init__(
        self, num_tokens: int, *, width: int, activation: nn.Module, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = activation
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(num_tokens))

    def forward(self, hidden_MD: Tensor, table_VD: Tensor) -> Tensor:
        """(M, D) and the (V, D) token table -> (M, V) logits."""
        ready_MD = self.norm(self.activation(self.dense(hidden_MD)))
        return functional.linear(ready_MD, table_VD, self.bias)


class ExpressionDecoder(nn.Module):
    """A hidden state to a value, through two hidden layers with leaky ReLU (scGPT's GEP).

    Args:
        width: D.
        num_inputs: widths of D it reads side by side: 2 with batch labels.
        expressed: a second branch for the logit of the gene being expressed at all.
    """

    def __init__(self, width: int, *, num_inputs: int = 1, expressed: bool = False) -> None:
        super().__init__()
        self.layers = _value_layers(width, num_inputs)
        self.expressed = _value_layers(width, num_inputs) if expressed else None

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) -> (M,)."""
        value_M: Tensor = self.layers(hidden_MD).squeeze(-1)
        return value_M

    def expressed_logit(self, hidden_MD: Tensor) -> Tensor | None:
        """(M, D) -> (M,), None without the second branch."""
        if self.expressed is None:
            return None
        logit_M: Tensor = self.expressed(hidden_MD).squeeze(-1)
        return logit_M


def _value_layers(width: int, num_inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_inputs * width, width),
        nn.LeakyReLU(),
        nn.Linear(width, width),
        nn.LeakyReLU(),
        nn.Linear(width, 1),
    )


class CellGeneDecoder(nn.Module):
    """A cell embedding and a gene embedding to a value (scGPT's GEPC, called MVC in its code).

    ``value = (W sigmoid(A e_gene + b)) . h_cell``, W without bias.

    Args:
        width: D.
        num_inputs: widths of D that a cell has: 2 with batch labels.
        expressed: a second projection for the logit of the gene being expressed at all.
    """

    def __init__(self, width: int, *, num_inputs: int = 1, expressed: bool = False) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.project = nn.Linear(width, num_inputs * width, bias=False)
        self.expressed = nn.Linear(width, num_inputs * width) if expressed else None

    def queries(self, genes_MD: Tensor) -> Tensor:
        """(M, D) gene embeddings -> (M, D) vectors to be multiplied with a cell embedding."""
        queries_MD: Tensor = self.project(torch.sigmoid(self.query(genes_MD)))
        return queries_MD

    def forward(self, genes_MD: Tensor, cells_MD: Tensor) -> Tensor:
        """Gene embeddings and the embeddings of the cells they are in -> (M,)."""
        return (self.queries(genes_MD) * cells_MD).sum(-1)

    def expressed_logit(self, genes_MD: Tensor, cells_MD: Tensor) -> Tensor | None:
        """As :meth:`forward`, None without the second projection."""
        if self.expressed is None:
            return None
        logit_M: Tensor = (self.expressed(torch.sigmoid(self.query(genes_MD))) * cells_MD).sum(-1)
        return logit_M


class MlpClassifier(nn.Module):
    """(Linear, activation, LayerNorm) x ``num_hidden``, then Linear: scGPT's classifier.

    Args:
        width: D.
        num_classes: C.
        num_hidden: hidden layers.
        activation: of the hidden layers.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        num_hidden: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(num_hidden):
            hidden += [nn.Linear(width, width), activation(), nn.LayerNorm(width)]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, num_classes))

    def forward(self, cell_BD: Tensor) -> Tensor:
        """(B, D) -> (B, C) logits."""
        logits_BC: Tensor = self.layers(cell_BD)
        return logits_BC


class PooledClassifier(nn.Module):
    """Dense and tanh (BERT's pooler), dropout, Linear.

    Args:
        width: D.
        num_classes: C.
        dropout: before the last layer.
    """

    def __init__(self, width: int, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.pooler = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, cell_BD: Tensor) -> Tensor:
        """(B, D) -> (B, C) logits."""
        pooled_BD = self.dropout(torch.tanh(self.pooler(cell_BD)))
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC


class GeneAxisClassifier(nn.Module):
    """scBERT's classifier: one number a place, then two hidden layers over all places.

    ``Linear(D -> 1)`` at each place, ReLU, then S -> 512 -> 128 -> C with ReLU and dropout.

    Args:
        width: D.
        num_classes: C.
        dropout: after each of the two hidden layers.
        num_places: S.
    """

    def __init__(self, width: int, *, num_classes: int, dropout: float, num_places: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, 1)
        self.layers = nn.Sequential(
            nn.Linear(num_places, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, num_classes),
        )

    def forward(self, panel_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, C) logits."""
        logits_BC: Tensor = self.layers(torch.relu(self.squeeze(panel_BSD).squeeze(-1)))
        return logits_BC


class NormedClassifier(nn.Module):
    """Batch norm without weights, a hidden layer of 256, Linear: scFoundation's classifier.

    A training batch of one cell is normalised by the running statistics.

    Args:
        width: D.
        num_classes: C.
    """

    def __init__(self, width: int, *, num_classes: int) -> None:
        super().__init__()
        self.norm = RowNorm(width, affine=False, eps=1e-6)
        self.layers = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, num_classes))

    def forward(self, cell_BD: Tensor) -> Tensor:
        """(B, D) -> (B, C) logits."""
        logits_BC: Tensor = self.layers(self.norm(cell_BD))
        return logits_BC


class TokenClassifier(nn.Module):
    """Dropout and Linear on every token: BERT's token classification head.

    Args:
        width: D.
        num_classes: C.
        dropout: before the layer.
    """

    def __init__(self, width: int, *, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., C) logits."""
        logits: Tensor = self.classifier(self.dropout(hidden))
        return logits
