"""TOSICA: a small transformer over pathways, each fed by its member genes alone.

Architecture and sizes: doi:10.1038/s41467-023-35923-4 and its published code. Log-normalised
expression is projected to one token a pathway along the memberships of a GMT file; a CLS token
stands before them; the cell is CLS after two pre-norm blocks. Trained with labels only. The
attention of CLS, rolled out over the layers, says which pathways a cell was told by.

The published code reshapes its projection so that each token mixes channels of many pathways
(``token_layout = "interleaved"``); here a token is its pathway unless that is asked for.

Legend: B cells, T tokens, G genes, P pathways, W width (D elsewhere), H heads, C classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.errors import DataError
from cellray.core.section import MAX_SEED
from cellray.data.gene_sets import choose_gene_sets, random_gene_sets, read_gmt
from cellray.data.vocab import Vocab
from cellray.models._panel import Panel
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig, Preset
from cellray.nn.activations import Activations, Work, encoder_activations
from cellray.nn.flops import TRAINING, linear_flops, training_encoder_flops
from cellray.nn.pathways import PathwayBlock, PathwayProjection, attention_rollout

__all__ = ["FAMILY", "Tosica", "TosicaConfig"]

Tensor = torch.Tensor

_HEAD_STD = 0.01
_CLS_STD = 0.02


class TosicaConfig(ModelConfig):
    """Sizes and switches of a TOSICA.

    Attributes:
        family: ``tosica``.
        width: W.
        num_layers: transformer blocks.
        num_heads: H; divides ``width``.
        dropout: in the blocks, on attention weights too.
        drop_path: stochastic depth of the last block; the first has 0, those between in line.
        gene_sets: a GMT file, ``hallmark`` (ships with cellray), or "" for random sets.
        max_listed_genes: longer sets of the file are left out.
        min_present_genes: sets with fewer genes in the data are left out.
        max_sets: the largest this many stay.
        unannotated: fully connected sets added to those of the file.
        random_fraction: of random sets: the share of genes in each.
        random_seed: of random sets.
        pre_logits: a dense layer with tanh between CLS and the classifier.
        token_layout: ``pathway``, or ``interleaved``, as the published code lays them out.
    """

    family: str = "tosica"
    width: int = Field(default=48, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    drop_path: float = Field(default=0.5, ge=0.0, lt=1.0)
    gene_sets: str = "hallmark"
    max_listed_genes: int = Field(default=300, ge=1)
    min_present_genes: int = Field(default=5, ge=1)
    max_sets: int = Field(default=300, ge=1)
    unannotated: int = Field(default=1, ge=0)
    random_fraction: float = Field(default=0.015, gt=0.0, le=1.0)
    random_seed: int = Field(default=1, ge=0, le=MAX_SEED)
    pre_logits: bool = False
    token_layout: Literal["pathway", "interleaved"] = "pathway"

    @model_validator(mode="after")
    def _sizes_fit(self) -> TosicaConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}"
            )
        return self


class Tosica(CellModel):
    """Cells as pathways; see :class:`TosicaConfig`.

    Capabilities: EmbedsCells, ExposesAttention, and :meth:`pathway_attention`.

    Args:
        config: sizes.
        context: the gene space, with its gene sets.
    """

    def __init__(self, config: TosicaConfig, context: BuildContext) -> None:
        super().__init__()
        sets = context.vocab.gene_sets
        assert sets is not None, "the family's build refuses a vocabulary without gene sets"
        self.config = config
        self.width = config.width
        self.panel = Panel(context.vocab, [])
        self.pathways = tuple(sets)
        self.fixed_length = len(sets) + 1
        self.projection = PathwayProjection(
            list(sets.values()), num_genes=len(context.vocab), width=config.width
        )
        self.cls = nn.Parameter(torch.zeros(config.width))
        rates = torch.linspace(0, config.drop_path, config.num_layers, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            PathwayBlock(
                config.width, num_heads=config.num_heads, dropout=config.dropout, drop_path=rate
            )
            for rate in rates
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.pre_logits = nn.Linear(config.width, config.width) if config.pre_logits else None
        nn.init.trunc_normal_(self.cls, std=_CLS_STD)
        self.blocks.apply(_init)
        if self.pre_logits is not None:
            self.pre_logits.apply(_init)

    def forward(self, batch: CellBatch) -> ModelOutput:
        """``panel`` is CLS and the pathways, (B, P + 1, W); ``hidden`` CLS beside every token."""
        panel_BTW = self._embed(batch)
        for block in self.blocks:
            panel_BTW = block(panel_BTW)
        panel_BTW = self.norm(panel_BTW)
        cell_BW = panel_BTW[:, 0]
        if self.pre_logits is not None:
            cell_BW = torch.tanh(self.pre_logits(cell_BW))
        return ModelOutput(hidden=cell_BW[batch.token_rows()], cell=cell_BW, panel=panel_BTW)

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """Memberships, which take no gradient to the values, and the blocks over the pathways."""
        config, cells = self.config, len(lengths_B)
        pairs = sum(len(genes) for genes in self.projection.members)
        blocks = training_encoder_flops(
            np.full(cells, self.fixed_length, dtype=np.int64),
            num_layers=config.num_layers,
            width=config.width,
            ffn_width=4 * config.width,
        )
        head = TRAINING * linear_flops(self.pre_logits)
        return blocks + cells * (2.0 * 2.0 * pairs * config.width + head)

    def activations(self, work: Work) -> Activations:
        """Blocks over the pathways of every cell, and the members' values."""
        config = self.config
        pathways = np.full(work.cells, self.fixed_length, dtype=np.int64)
        work = work.with_lengths(pathways, packed=False)
        blocks = encoder_activations(
            work,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=4 * config.width,
            activation="gelu",
            dropout=config.dropout,
            attention_dropout=config.dropout,
            inner_dropout=config.dropout,
        )
        pairs = sum(len(genes) for genes in self.projection.members)
        around = work.cells * float(work.wide * pairs) + work.tokens * 4.0 * config.width
        return blocks + Activations(around + work.weights(self))

    def embed_cells(self, batch: CellBatch) -> Tensor:
        """The output at CLS, (B, W) float32."""
        return self.forward(batch).cell.float()

    def attention(self, batch: CellBatch, layer: int = -1) -> Tensor:
        """Attention of one layer over CLS and the pathways, (B, H, P + 1, P + 1) float32."""
        return self._weights(batch)[layer]

    def pathway_attention(self, batch: CellBatch) -> Tensor:
        """What CLS is made of by attention rollout, (B, P) float32, in ``pathways``' order."""
        return attention_rollout(self._weights(batch))[:, 0, 1:]

    def gene_weights(self) -> Tensor:
        """Largest absolute weight from each gene to each pathway, (P, G) float32."""
        table_PG = torch.zeros(len(self.pathways), self.panel.num_genes)
        largest_N = self.projection.weight.detach().abs().amax(1).float().cpu()
        start = 0
        for row, genes in enumerate(self.projection.members):
            table_PG[row, list(genes)] = largest_N[start : start + len(genes)]
            start += len(genes)
        return table_PG

    def _embed(self, batch: CellBatch) -> Tensor:
        values_BG = self.panel.spread(batch, self.panel.places(batch), batch.values)
        tokens_BPW = self.projection(values_BG)
        if self.config.token_layout == "interleaved":
            count, width = tokens_BPW.shape[1:]
            tokens_BPW = tokens_BPW.reshape(-1, width, count).transpose(1, 2)
        cls_B1W = self.cls.to(tokens_BPW.dtype).expand(len(batch), 1, -1)
        return torch.cat([cls_B1W, tokens_BPW], dim=1)

    def _weights(self, batch: CellBatch) -> list[Tensor]:
        """Attention of every layer."""
        hidden_BTW = self._embed(batch)
        found = []
        for block in self.blocks:
            assert isinstance(block, PathwayBlock)
            found.append(block.weights(hidden_BTW))
            hidden_BTW = block(hidden_BTW)
        return found


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=_HEAD_STD)
        nn.init.zeros_(module.bias)


def _build(config: TosicaConfig, context: BuildContext) -> Tosica:
    """Raises DataError if the vocabulary carries no gene sets."""
    if not context.vocab.gene_sets:
        raise DataError(
            "a TOSICA needs gene sets in its vocabulary, and this one has none; a run adds them "
            "from model.gene_sets"
        )
    return Tosica(config, context)


def _prepare(config: TosicaConfig, vocab: Vocab) -> Vocab:
    """The vocabulary with the gene sets of ``config``.

    Raises:
        CellrayError: no such file, not GMT, or no gene in common with the data.
    """
    if not config.gene_sets:
        sets = random_gene_sets(
            vocab,
            num_sets=config.max_sets,
            fraction=config.random_fraction,
            seed=config.random_seed,
        )
        return vocab.with_gene_sets({name: genes for name, genes in sets.items() if genes})
    return vocab.with_gene_sets(
        choose_gene_sets(
            read_gmt(config.gene_sets),
            vocab,
            max_listed=config.max_listed_genes,
            min_present=config.min_present_genes,
            max_sets=config.max_sets,
            unannotated=config.unannotated,
            source=config.gene_sets,
        )
    )


def _classifier(config: TosicaConfig, context: BuildContext, num_classes: int) -> nn.Module:
    return nn.Linear(config.width, num_classes).apply(_init)


FAMILY = Family(
    name="tosica",
    config=TosicaConfig,
    tokenizer="lognorm",
    objective="classification",
    build=_build,
    classifier=_classifier,
    prepare=_prepare,
    refuse_below=0.1,
    presets={
        "published": Preset(
            model={},
            tokenizer={},
            num_genes=3_000,
            specials=("<pad>",),
            num_parameters=0,
            source="doi:10.1038/s41467-023-35923-4",
        )
    },
)
