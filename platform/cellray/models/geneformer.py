"""Geneformer: a BERT encoder over the genes of a cell in rank order.

Architecture and sizes: doi:10.1038/s41586-023-06139-9 and the configurations of the published
models. Post-norm blocks, absolute positions, one token type, masked-gene head tied to the gene
table. The defaults are those of the 10 M parameter model.

Legend: B cells, T tokens, D width, H heads, G genes, V vocabulary tokens, M masked tokens, C
classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput, unpack
from cellray.core.errors import ConfigError
from cellray.core.packing import Packing
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig, Preset
from cellray.nn.activations import (
    Activations,
    Work,
    encoder_activations,
    logits_activations,
)
from cellray.nn.attention import Kernel
from cellray.nn.blocks import Activation, BlockSpec, Encoder
from cellray.nn.embeddings import RankedEmbedding
from cellray.nn.flops import TRAINING, linear_flops, training_encoder_flops
from cellray.nn.heads import PooledClassifier, TiedTokenDecoder, TokenClassifier
from cellray.nn.init import init_bert

__all__ = ["FAMILY", "Geneformer", "GeneformerConfig"]

Tensor = torch.Tensor


class GeneformerConfig(ModelConfig):
    """Sizes of a Geneformer.

    Attributes:
        family: ``geneformer``.
        width: D.
        num_layers: encoder blocks.
        num_heads: H; divides ``width``.
        ffn_width: inner width of the feed-forward layers.
        dropout: after the embedding, attention and feed-forward layers, and in the classifier.
        attention_dropout: on attention weights; None takes ``dropout``.
        activation: of feed-forward layers and the masked-gene head.
        layer_norm_eps: epsilon of every layer norm.
        max_positions: rows of the position table; 0 takes the tokenizer's ``max_tokens``.
        embedding_layer: hidden state that zero-shot cell embeddings are made of: 0 the last, -1
            the second to last (the source's recommendation), down to ``-num_layers``, the
            embedding itself.
        cell_embedding: ``mean`` over gene tokens, or ``cls``, the first token (for V2 models, whose
            tokenizer puts ``<cls>`` there).
        masked_head: False builds no masked-gene head, as published classifiers have none; such a
            model cannot be pretrained further.
        attention: kernel for packed cells, see :func:`cellray.nn.attention.attend`.
    """

    family: str = "geneformer"
    width: int = Field(default=256, ge=1)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    ffn_width: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.02, ge=0.0, lt=1.0)
    attention_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    activation: Activation = "relu"
    layer_norm_eps: float = Field(default=1e-12, gt=0.0)
    max_positions: int = Field(default=0, ge=0)
    embedding_layer: int = Field(default=-1, le=0)
    cell_embedding: Literal["mean", "cls"] = "mean"
    masked_head: bool = True
    attention: Kernel = "auto"

    @model_validator(mode="after")
    def _sizes_fit(self) -> GeneformerConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}"
            )
        if -self.embedding_layer > self.num_layers:
            raise ValueError(
                f"embedding_layer = {self.embedding_layer} is before the first of num_layers = "
                f"{self.num_layers}; allowed: {-self.num_layers} .. 0"
            )
        return self


class Geneformer(CellModel):
    """Predicts hidden genes of a ranked cell; see :class:`GeneformerConfig`.

    Capabilities: EmbedsCells, EmbedsGenes, ExposesAttention. They follow the module's mode and the
    caller's gradient mode: call ``eval()`` and use ``torch.no_grad()`` for repeatable embeddings.

    Args:
        config: sizes.
        context: the vocabulary and the longest cell.
    """

    def __init__(self, config: GeneformerConfig, context: BuildContext) -> None:
        super().__init__()
        vocab = context.vocab
        self.config = config
        self.width = config.width
        self.num_positions = config.max_positions or context.max_tokens
        self.embedding = RankedEmbedding(
            vocab.num_tokens,
            num_positions=self.num_positions,
            width=config.width,
            layer_norm_eps=config.layer_norm_eps,
            dropout=config.dropout,
        )
        spec = BlockSpec(
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=(
                config.dropout if config.attention_dropout is None else config.attention_dropout
            ),
            layer_norm_eps=config.layer_norm_eps,
            kernel=config.attention,
        )
        self.encoder = Encoder(spec, num_layers=config.num_layers)
        self.decoder: TiedTokenDecoder | None = None
        if config.masked_head:
            self.decoder = TiedTokenDecoder(
                vocab.num_tokens,
                width=config.width,
                activation=nn.ReLU() if config.activation == "relu" else nn.GELU(),
                layer_norm_eps=config.layer_norm_eps,
            )
        self.apply(init_bert)
        ends = [vocab.specials[name] for name in ("<cls>", "<eos>") if name in vocab.specials]
        self._end_tokens = ends
        self._pad = vocab.pad
        self._gene_tokens = torch.tensor(vocab.gene_tokens.tolist(), device="cpu")

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts ``token_logits`` (M, V), in row-major order of ``batch.target_mask``."""
        hidden_BTD = self._encode(batch, self.config.num_layers)
        predictions = {}
        if batch.target_mask is not None and self.decoder is not None:
            masked_MD = hidden_BTD[batch.target_mask]
            predictions["token_logits"] = self.decoder(masked_MD, self.embedding.token.weight)
        return ModelOutput(
            hidden=hidden_BTD, cell=self._pool(hidden_BTD, batch), predictions=predictions
        )

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The encoder; at targets the head's dense layer and ``6 d V`` for the tied table."""
        config = self.config
        encoder = training_encoder_flops(
            lengths_B,
            num_layers=config.num_layers,
            width=config.width,
            ffn_width=config.ffn_width,
        )
        if self.decoder is None:
            return encoder
        tied = 2.0 * config.width * self.embedding.token.num_embeddings
        return encoder + TRAINING * num_targets * (linear_flops(self.decoder) + tied)

    def activations(self, work: Work) -> Activations:
        """The encoder, the embedding's norm, and logits over the vocabulary at targets."""
        config = self.config
        attention = config.attention_dropout
        encoder = encoder_activations(
            work,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.dropout if attention is None else attention,
        )
        embedded = work.tokens * config.width * (4.0 + work.mask * bool(config.dropout))
        rest = Activations(embedded + work.weights(self))
        if self.decoder is None:
            return encoder + rest
        return (
            encoder
            + rest
            + logits_activations(
                work, num_classes=self.embedding.token.num_embeddings, width=config.width
            )
        )

    def embed_cells(self, batch: CellBatch) -> Tensor:
        """Pooled hidden state of ``config.embedding_layer``, (B, D) float32."""
        num_layers = self.config.num_layers + self.config.embedding_layer
        return self._pool(self._encode(batch, num_layers), batch).float()

    def hidden_states(self, batch: CellBatch, layer: int = 0) -> Tensor:
        """Every gene in the context of its cell, (B, T, D) or packed (P, D) float32.

        Args:
            batch: padded or packed.
            layer: 0 the last hidden state, -1 the second to last, as ``config.embedding_layer``.
        """
        return self._encode(batch, self.config.num_layers + layer).float()

    def embed_genes(self) -> Tensor:
        """The token table's rows of the genes, in vocabulary order, (G, D)."""
        table_VD = self.embedding.token.weight
        return table_VD[self._gene_tokens.to(table_VD.device)]

    def attention(self, batch: CellBatch, layer: int = -1) -> Tensor:
        """Attention weights of one layer, (B, H, T, T) float32, 0 at padding."""
        batch = unpack(batch, pad=self._pad)
        embedded_BTD = self.embedding(batch.token_ids)
        return self.encoder.probabilities(embedded_BTD, batch.attention_mask, layer=layer)

    def _encode(self, batch: CellBatch, num_layers: int) -> Tensor:
        length = batch.longest
        if length > self.num_positions:
            raise ConfigError(
                f"a cell of {length} tokens does not fit into {self.num_positions} positions; "
                "lower tokenizer.max_tokens or raise model.max_positions"
            )
        packing = batch.packing
        positions_P = None if packing is None else packing.positions
        hidden_BTD: Tensor = self.encoder(
            self.embedding(batch.token_ids, positions_P),
            batch.attention_mask,
            packing=packing,
            num_layers=num_layers,
        )
        return hidden_BTD

    def _pool(self, hidden_BTD: Tensor, batch: CellBatch) -> Tensor:
        """(B, D) first token, or mean over gene tokens (over all tokens where there is no gene)."""
        if self.config.cell_embedding == "cls":
            return batch.first_tokens(hidden_BTD)
        genes_BT = batch.attention_mask
        for token in self._end_tokens:
            genes_BT = genes_BT & (batch.token_ids != token)
        if batch.packing is not None:
            return _packed_mean(hidden_BTD, genes_BT, batch.packing)
        genes_BT = torch.where(genes_BT.any(1, keepdim=True), genes_BT, batch.attention_mask)
        weights_BT = genes_BT / genes_BT.sum(1, keepdim=True)
        return (hidden_BTD * weights_BT[..., None]).sum(1)


def _packed_mean(hidden_PD: Tensor, genes_P: Tensor, packing: Packing) -> Tensor:
    """(B, D) mean over each cell's genes; over all its tokens where it has none."""
    rows_P, num_cells = packing.rows, len(packing.starts)
    per_gene_P = genes_P.float()
    genes_B = per_gene_P.new_zeros(num_cells).index_add(0, rows_P, per_gene_P)
    weights_P = (genes_P | (genes_B == 0)[rows_P]).float()
    counts_B = weights_P.new_zeros(num_cells).index_add(0, rows_P, weights_P)
    weighted_PD = hidden_PD * (weights_P / counts_B[rows_P])[:, None]
    return weighted_PD.new_zeros(num_cells, hidden_PD.shape[1]).index_add(0, rows_P, weighted_PD)


def _build(config: GeneformerConfig, context: BuildContext) -> Geneformer:
    """Raises ConfigError if the tokenizer's cells do not fit into the position table."""
    if config.max_positions and context.max_tokens > config.max_positions:
        raise ConfigError(
            f"tokenizer.max_tokens = {context.max_tokens} is more than model.max_positions = "
            f"{config.max_positions}; lower the one or raise the other"
        )
    return Geneformer(config, context)


def _classifier(config: GeneformerConfig, context: BuildContext, num_classes: int) -> nn.Module:
    head = PooledClassifier(config.width, num_classes=num_classes, dropout=config.dropout)
    return head.apply(init_bert)


def _gene_classifier(
    config: GeneformerConfig, context: BuildContext, num_classes: int
) -> nn.Module:
    head = TokenClassifier(config.width, num_classes=num_classes, dropout=config.dropout)
    return head.apply(init_bert)


_V1, _V2 = ("<pad>", "<mask>"), ("<pad>", "<mask>", "<cls>", "<eos>")
_V1_ARTICLE = "doi:10.1038/s41586-023-06139-9"
_V2_ARTICLE = "doi:10.1038/s43588-026-00972-4"


def _preset(
    size: tuple[int, int, int, int], *, dropout: float, second: bool, num_parameters: int
) -> Preset:
    """A published size: layers, width, heads, inner width; of the first or a later generation."""
    num_layers, width, num_heads, ffn_width = size
    model = {
        "num_layers": num_layers,
        "width": width,
        "num_heads": num_heads,
        "ffn_width": ffn_width,
        "dropout": dropout,
        "cell_embedding": "cls" if second else "mean",
    }
    return Preset(
        model=model,
        tokenizer={"max_tokens": 4096 if second else 2048, "specials": second},
        num_genes=20_271 if second else 25_424,
        specials=_V2 if second else _V1,
        num_parameters=num_parameters,
        source=_V2_ARTICLE if second else _V1_ARTICLE,
    )


_PRESETS = {
    "V1-10M": _preset((6, 256, 4, 512), dropout=0.02, second=False, num_parameters=10_288_722),
    "V1-40M": _preset((12, 512, 8, 1024), dropout=0.02, second=False, num_parameters=39_591_250),
    "12L-38M": _preset((12, 512, 8, 1024), dropout=0.02, second=True, num_parameters=37_997_363),
    "20L-151M": _preset((20, 896, 14, 1792), dropout=0.02, second=True, num_parameters=151_313_459),
    "V2-104M": _preset((12, 768, 12, 3072), dropout=0.1, second=True, num_parameters=104_386_867),
    "V2-316M": _preset((18, 1152, 18, 4608), dropout=0.1, second=True, num_parameters=316_354_867),
}

FAMILY = Family(
    name="geneformer",
    config=GeneformerConfig,
    tokenizer="rank",
    objective="masked",
    build=_build,
    classifier=_classifier,
    gene_classifier=_gene_classifier,
    presets=_PRESETS,
)
