"""scBERT: a Performer encoder over a fixed gene panel with binned expression.

Architecture and sizes: doi:10.1038/s42256-022-00534-z. A place of the panel is the sum of a bin
embedding and a gene embedding (gene2vec, where it is given); one place more, the last, has bin 0
and plays the part of CLS. Pre-norm blocks of FAVOR+ attention, a final norm, logits over bins. The
defaults are those of the published model.

Legend: B cells, T tokens, S places (genes and CLS), G genes, D width, H heads, C bins with the zero
bin and the mask, M chosen tokens of a batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.errors import ConfigError
from cellray.data.gene_table import read_gene_table
from cellray.data.vocab import Vocab
from cellray.models._panel import Panel
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig, Preset
from cellray.nn.activations import Activations, Work, performer_activations
from cellray.nn.favor import KeyMax, num_features
from cellray.nn.flops import TRAINING, linear_flops, training_performer_flops
from cellray.nn.heads import GeneAxisClassifier
from cellray.nn.performer import Performer, PerformerBlock, PerformerSpec

__all__ = ["FAMILY", "Scbert", "ScbertConfig"]

Tensor = torch.Tensor


class ScbertConfig(ModelConfig):
    """Sizes and switches of an scBERT.

    Attributes:
        family: ``scbert``.
        width: D; with ``gene2vec`` the width of its vectors.
        num_layers: Performer blocks.
        num_heads: H.
        head_width: width of a head; H * ``head_width`` need not be D.
        ffn_width: inner width of the feed-forward layers.
        dropout: in the blocks and the classifier; 0 in the source.
        num_bins: the highest bin, as the tokenizer's ``num_bins``.
        gene2vec: file of gene vectors that the gene table starts with and keeps (see
            :func:`cellray.data.gene_table.read_gene_table`); "" learns the table.
        freeze_genes: do not train the gene table; always so with ``gene2vec``.
        key_max: over what the keys' maximum of FAVOR+ is taken: ``cell`` makes a cell independent
            of its batch and equals the source run one cell at a time; ``tensor`` is the source's.
        redraw_every: optimizer steps between two draws of random features; 0 keeps the first.
        cell_embedding: zero-shot embedding: ``mean`` over all places, ``expressed`` over the
            cell's tokens, or ``cls``, the last place.
        masked_head: False builds no head of bins, as fine-tuned published models have none; such a
            model cannot be pretrained further.
    """

    family: str = "scbert"
    width: int = Field(default=200, ge=1)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=10, ge=1)
    head_width: int = Field(default=64, ge=2)
    ffn_width: int = Field(default=800, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    num_bins: int = Field(default=5, ge=1, le=31)
    gene2vec: str = ""
    freeze_genes: bool = False
    key_max: KeyMax = "cell"
    redraw_every: int = Field(default=1000, ge=0)
    cell_embedding: Literal["mean", "expressed", "cls"] = "mean"
    masked_head: bool = True

    @model_validator(mode="after")
    def _frozen_where_given(self) -> ScbertConfig:
        if self.gene2vec and not self.freeze_genes:
            object.__setattr__(self, "freeze_genes", True)
        return self

    @property
    def num_classes(self) -> int:
        """C: bins 0 .. ``num_bins`` and the mask."""
        return self.num_bins + 2


class Scbert(CellModel):
    """Names hidden bins of a cell's genes; see :class:`ScbertConfig`.

    Capabilities: EmbedsCells, EmbedsGenes, PredictsExpression, ExposesAttention. They follow the
    module's mode and the caller's gradient mode: call ``eval()`` and use ``torch.no_grad()`` for
    repeatable results.

    Args:
        config: sizes.
        context: the gene panel.
    """

    linear_attention = True

    def __init__(self, config: ScbertConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.width = config.width
        self.panel = Panel(context.vocab, [None])
        self.fixed_length = self.panel.num_places
        self.bins = nn.Embedding(config.num_classes, config.width)
        self.genes = nn.Embedding(self.panel.num_places, config.width)
        self.genes.weight.requires_grad_(not config.freeze_genes)
        self.encoder = Performer(
            PerformerSpec(
                width=config.width,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                head_width=config.head_width,
                ffn_width=config.ffn_width,
                bias=False,
                dropout=config.dropout,
                key_max=config.key_max,
                redraw_every=config.redraw_every,
            )
        )
        self.norm = nn.LayerNorm(config.width)
        self.to_bins: nn.Linear | None = None
        if config.masked_head:
            self.to_bins = nn.Linear(config.width, config.num_classes)

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts ``bin_logits`` (M, C), in row-major order of ``batch.target_mask``."""
        places = self.panel.places(batch)
        panel_BSD = self._encode(batch, places)
        hidden_BTD = self.panel.gather(panel_BSD, batch, places)
        predictions = {}
        if batch.target_mask is not None and self.to_bins is not None:
            predictions["bin_logits"] = self.to_bins(hidden_BTD[batch.target_mask])
        cell_BD = self._pool(panel_BSD, batch, places)
        return ModelOutput(
            hidden=hidden_BTD, cell=cell_BD, predictions=predictions, panel=panel_BSD
        )

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The Performer over the whole panel of every cell, the head of bins at targets."""
        config = self.config
        encoder = training_performer_flops(
            float(len(lengths_B) * self.panel.num_places),
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            head_width=config.head_width,
            ffn_width=config.ffn_width,
            num_features=num_features(config.head_width),
        )
        return encoder + TRAINING * linear_flops(self.to_bins) * num_targets

    def activations(self, work: Work) -> Activations:
        """The Performer and the last norm over the whole panel of every cell."""
        config = self.config
        panel = np.full(work.cells, self.panel.num_places, dtype=np.int64)
        work = work.with_lengths(panel, packed=False)
        encoder = performer_activations(
            work,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            head_width=config.head_width,
            ffn_width=config.ffn_width,
            num_features=num_features(config.head_width),
            dropout=config.dropout,
        )
        # the norm's input, and its output, which the batch's tokens are gathered from
        return encoder + Activations(work.tokens * config.width * 8.0 + work.weights(self))

    def embed_cells(self, batch: CellBatch) -> Tensor:
        """See ``config.cell_embedding``, (B, D) float32."""
        places = self.panel.places(batch)
        return self._pool(self._encode(batch, places), batch, places).float()

    def embed_genes(self) -> Tensor:
        """The gene table in vocabulary order, (G, D)."""
        return self.genes.weight[: self.panel.num_genes]

    def bin_logits(self, batch: CellBatch) -> Tensor:
        """Logits over bins at every place, genes in vocabulary order, then CLS, (B, S, C).

        Raises:
            ConfigError: the model has no head of bins.
        """
        if self.to_bins is None:
            raise ConfigError("this scBERT was built without its head of bins (model.masked_head)")
        logits_BSC: Tensor = self.to_bins(self._encode(batch, self.panel.places(batch)))
        return logits_BSC

    def predict_expression(self, batch: CellBatch) -> Tensor:
        """Expected bin of every gene of the vocabulary, (B, G) float32."""
        logits_BGC = self.bin_logits(batch)[:, : self.panel.num_genes, :-1].float()
        bins_C = torch.arange(logits_BGC.shape[-1], device=logits_BGC.device).float()
        return (torch.softmax(logits_BGC, dim=-1) * bins_C).sum(-1)

    def attention(self, batch: CellBatch, layer: int = -1) -> Tensor:
        """Attention of one layer among all places, (B, H, S, S) float32; S^2 numbers a head."""
        embedded_BSD = self._embed(batch, self.panel.places(batch))
        queries, keys = self.encoder.weights(embedded_BSD, layer=layer)
        with torch.autocast(queries.device.type, enabled=False):
            return queries @ keys.transpose(-1, -2)

    def attention_sums(self, batch: CellBatch) -> Tensor:
        """How much attention each gene receives: sum over all places, mean over heads and layers.

        The column sums of the source's averaged (S, S) matrix, without that matrix: sums of
        products of random features are products of their sums. (B, G) float32.
        """
        hidden_BSD = self._embed(batch, self.panel.places(batch))
        received = hidden_BSD.new_zeros(len(batch), self.panel.num_places, dtype=torch.float32)
        for block in self.encoder.blocks:
            assert isinstance(block, PerformerBlock)
            queries, keys = block.attention.weights(block.attention_norm(hidden_BSD))
            received += (keys @ queries.sum(-2)[..., None]).squeeze(-1).mean(1)
            hidden_BSD = block(hidden_BSD)
        return received[:, : self.panel.num_genes] / len(self.encoder.blocks)

    def _embed(self, batch: CellBatch, places: Tensor) -> Tensor:
        """Bin + gene, (B, S, D)."""
        values = batch.values
        if batch.unknown_mask is not None:
            values = values.masked_fill(batch.unknown_mask, float(self.config.num_classes - 1))
        bins_BS = self.panel.spread(batch, places, values).long()
        # by a call, not by attribute: under ZeRO 3 a module's weights are there in its call
        every_S = torch.arange(self.panel.num_places, device=bins_BS.device)
        embedded_BSD: Tensor = self.bins(bins_BS) + self.genes(every_S)
        return embedded_BSD

    def _encode(self, batch: CellBatch, places: Tensor) -> Tensor:
        """(B, S, D) after the final norm."""
        embedded_BSD = self._embed(batch, places)
        hidden_BSD: Tensor = self.norm(self.encoder(embedded_BSD, step=batch.step))
        return hidden_BSD

    def _pool(self, panel_BSD: Tensor, batch: CellBatch, places: Tensor) -> Tensor:
        kind = self.config.cell_embedding
        if kind == "cls":
            return panel_BSD[:, -1]
        if kind == "mean":
            return panel_BSD.mean(1)
        there = torch.ones(places.shape, dtype=panel_BSD.dtype, device=places.device)
        weights_BS = self.panel.spread(batch, places, there)
        weights_BS = torch.where(weights_BS.any(1, keepdim=True), weights_BS, 1.0)
        return (weights_BS[:, None] @ panel_BSD).squeeze(1) / weights_BS.sum(1, keepdim=True)


def _build(config: ScbertConfig, context: BuildContext) -> Scbert:
    """Raises ConfigError if the tokenizer's bins are not the model's."""
    bins = context.tokenizer.get("num_bins", config.num_bins)
    if bins != config.num_bins:
        raise ConfigError(
            f"tokenizer.num_bins = {bins}, but model.num_bins = {config.num_bins}: set both to the "
            "same number"
        )
    return Scbert(config, context)


def _classifier(config: ScbertConfig, context: BuildContext, num_classes: int) -> nn.Module:
    return GeneAxisClassifier(
        config.width,
        num_classes=num_classes,
        dropout=config.dropout,
        num_places=len(context.vocab) + 1,
    )


def _start(config: ScbertConfig, vocab: Vocab) -> dict[str, Tensor]:
    """The gene table of ``config.gene2vec``, with zeros at CLS.

    Raises:
        DataError: the file is missing, unreadable, or has none of the genes.
        ConfigError: its vectors have another width than the model.
    """
    if not config.gene2vec:
        return {}
    table = read_gene_table(config.gene2vec, vocab)
    if table.shape[1] != config.width:
        raise ConfigError(
            f"model.gene2vec = '{config.gene2vec}' has vectors of {table.shape[1]} numbers, but "
            f"model.width = {config.width}; set model.width = {table.shape[1]}"
        )
    weight = torch.zeros(len(vocab) + 1, config.width)
    weight[:-1] = torch.from_numpy(table)
    return {"genes.weight": weight}


FAMILY = Family(
    name="scbert",
    config=ScbertConfig,
    tokenizer="panel",
    objective="masked_bins",
    build=_build,
    classifier=_classifier,
    head_reads="panel",
    start=_start,
    refuse_below=0.5,
    presets={
        "panglao": Preset(
            model={"freeze_genes": True},
            tokenizer={"num_bins": 5},
            num_genes=16_906,
            specials=("<pad>",),
            num_parameters=8_388_607,
            source="doi:10.1038/s42256-022-00534-z",
        )
    },
)
