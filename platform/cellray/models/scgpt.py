"""scGPT: a transformer over a cell's genes with their binned values, trained generatively.

Architecture and sizes: doi:10.1038/s41592-024-02201-0 and its published code. A token is the sum of
a gene embedding and a value embedding (or, where the value is hidden, a flag), plus a condition
embedding if the run asks for one. No positions: the order of genes carries nothing. The cell is the
output at ``<cls>``, the first token. The defaults are those of the whole-human model.

Legend: B cells, T tokens, D width, H heads, G genes, M hidden tokens of a batch, C classes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput, unpack
from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig
from cellray.nn.blocks import Activation, BlockSpec, Encoder
from cellray.nn.embeddings import ConditionEmbedding, ContinuousValueEncoder, NormedEmbedding
from cellray.nn.heads import CellGeneDecoder, ExpressionDecoder, MlpClassifier
from cellray.nn.init import init_transformer

__all__ = ["FAMILY", "Scgpt", "ScgptConfig"]

Tensor = torch.Tensor

_CLASSIFIER_HIDDEN = 2
_TABLE_RANGE = 0.1
_GENES_PER_CHUNK = 8_192


class ScgptConfig(ModelConfig):
    """Sizes and switches of an scGPT.

    Attributes:
        family: ``scgpt``.
        width: D.
        num_layers: encoder blocks.
        num_heads: H; divides ``width``.
        ffn_width: inner width of the feed-forward layers.
        dropout: everywhere in the encoder and after the value encoder.
        activation: of the feed-forward layers.
        condition: covariate whose embedding is added to every token (``data.covariates`` must name
            it); None adds nothing.
        gen_out_proj: apply the attention's output projection at hidden tokens, too. False is the
            original's slip, under which its published weights were trained.
    """

    family: str = "scgpt"
    width: int = Field(default=512, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=8, ge=1)
    ffn_width: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)
    activation: Activation = "relu"
    condition: str | None = None
    gen_out_proj: bool = True

    @model_validator(mode="after")
    def _sizes_fit(self) -> ScgptConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}"
            )
        return self


class Scgpt(CellModel):
    """Predicts hidden values of a cell from the known ones; see :class:`ScgptConfig`.

    Capabilities: EmbedsCells, EmbedsGenes, PredictsExpression, ExposesAttention. They follow the
    module's mode and the caller's gradient mode: call ``eval()`` and use ``torch.no_grad()`` for
    repeatable results.

    Args:
        config: sizes.
        context: the vocabulary and the covariates' numbers of categories.
    """

    def __init__(self, config: ScgptConfig, context: BuildContext) -> None:
        super().__init__()
        vocab = context.vocab
        self.config = config
        self.width = config.width
        self.genes = NormedEmbedding(vocab.num_tokens, width=config.width)
        self.values = ContinuousValueEncoder(config.width, dropout=config.dropout)
        self.flag = nn.Embedding(2, config.width)
        self.condition: ConditionEmbedding | None = None
        if config.condition is not None:
            categories = context.covariates[config.condition]
            self.condition = ConditionEmbedding(categories, width=config.width)
        spec = BlockSpec(
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            inner_dropout=config.dropout,
            project_unknown=config.gen_out_proj,
        )
        self.encoder = Encoder(spec, num_layers=config.num_layers)
        self.expression = ExpressionDecoder(config.width)
        self.expression_from_cell = CellGeneDecoder(config.width)
        self.apply(init_transformer)
        nn.init.uniform_(self.genes.table.weight, -_TABLE_RANGE, _TABLE_RANGE)
        self._pad = vocab.pad
        self._gene_tokens = torch.tensor(vocab.gene_tokens.tolist(), device="cpu")

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts the values at ``batch.target_mask``, (M,) each, in row-major order.

        ``expression`` from the token's own hidden state, ``expression_from_cell`` from the cell and
        gene embeddings, and with ``batch.cell_prompt`` also ``expression_cell_prompt``, from a
        second pass in which the detached cell embedding stands in the place of ``<cls>``.
        """
        genes_BTD = self.genes(batch.token_ids)
        embedded_BTD = self._embed(batch, genes_BTD)
        hidden_BTD = self._encode(batch, embedded_BTD)
        cell_BD = batch.first_tokens(hidden_BTD)
        predictions: dict[str, Tensor] = {}
        where = batch.target_mask
        if where is not None:
            rows_M = batch.token_rows()[where]
            predictions["expression"] = self.expression(hidden_BTD[where])
            predictions["expression_from_cell"] = self.expression_from_cell(
                genes_BTD[where], cell_BD[rows_M]
            )
            if batch.cell_prompt:
                prompt_BD = cell_BD.detach().to(embedded_BTD.dtype)
                prompted_BTD = batch.with_first_tokens(embedded_BTD, prompt_BD)
                second_BTD = self._encode(batch, prompted_BTD)
                predictions["expression_cell_prompt"] = self.expression(second_BTD[where])
        return ModelOutput(hidden=hidden_BTD, cell=cell_BD, predictions=predictions)

    def embed_cells(self, batch: CellBatch) -> Tensor:
        """The output at ``<cls>`` with every value known, (B, D) float32."""
        bare = replace(batch, targets=None, target_mask=None, unknown_mask=None)
        return self.forward(bare).cell.float()

    def embed_genes(self) -> Tensor:
        """The gene encoder's output in vocabulary order, without cell context, (G, D)."""
        tokens_G = self._gene_tokens.to(self.genes.table.weight.device)
        embedded_GD: Tensor = self.genes(tokens_G)
        return embedded_GD

    def predict_expression(self, batch: CellBatch) -> Tensor:
        """Bin of every gene of the vocabulary, (B, G) float32, from the cell embedding.

        The cell-to-gene decoder (GEPC) needs only the cell embedding and the gene table, so it
        answers for genes that are not in the cell's tokens. Genes are taken in chunks.
        """
        cell_BD = self.embed_cells(batch)
        tokens_G = self._gene_tokens.to(cell_BD.device)
        parts = []
        for start in range(0, len(tokens_G), _GENES_PER_CHUNK):
            genes_D = self.genes(tokens_G[start : start + _GENES_PER_CHUNK])
            queries = self.expression_from_cell.queries(genes_D)
            parts.append(cell_BD @ queries.float().T)
        return torch.cat(parts, dim=1)

    def attention(self, batch: CellBatch, layer: int = -1) -> Tensor:
        """Attention weights of one layer with every value known, (B, H, T, T) float32."""
        bare = replace(unpack(batch, pad=self._pad), unknown_mask=None)
        embedded_BTD = self._embed(bare, self.genes(bare.token_ids))
        return self.encoder.probabilities(embedded_BTD, bare.attention_mask, layer=layer)

    def _encode(self, batch: CellBatch, embedded_BTD: Tensor) -> Tensor:
        hidden_BTD: Tensor = self.encoder(
            embedded_BTD, batch.attention_mask, batch.unknown_mask, packing=batch.packing
        )
        return hidden_BTD

    def _embed(self, batch: CellBatch, genes_BTD: Tensor) -> Tensor:
        """Gene + (value or flag) + condition, (B, T, D)."""
        second_BTD = self.values(batch.values)
        if batch.unknown_mask is not None:
            flag_D = self.flag(torch.ones((), dtype=torch.long, device=genes_BTD.device))
            unknown_BT1 = batch.unknown_mask[..., None]
            second_BTD = torch.where(unknown_BT1, flag_D.to(second_BTD.dtype), second_BTD)
        embedded_BTD: Tensor = genes_BTD + second_BTD
        if self.condition is None:
            return embedded_BTD
        name = str(self.config.condition)
        if name not in batch.covariates:
            raise DataError(
                f"model.condition = '{name}', but the batch carries the covariates "
                f"{sorted(batch.covariates)}; add '{name}' to data.covariates"
            )
        condition_BD: Tensor = self.condition(batch.covariates[name])
        return embedded_BTD + batch.to_tokens(condition_BD)


def _build(config: ScgptConfig, context: BuildContext) -> Scgpt:
    """Raises ConfigError if the condition is not a covariate of the run."""
    name = config.condition
    if name is not None and name not in context.covariates:
        allowed = sorted(context.covariates)
        raise ConfigError(
            f"model.condition = '{name}' is not a covariate of this run."
            f"{did_you_mean(name, allowed)} data.covariates has: {', '.join(allowed) or 'none'}"
        )
    return Scgpt(config, context)


def _classifier(config: ScgptConfig, context: BuildContext, num_classes: int) -> nn.Module:
    return MlpClassifier(config.width, num_classes=num_classes, num_hidden=_CLASSIFIER_HIDDEN)


FAMILY = Family(
    name="scgpt",
    config=ScgptConfig,
    tokenizer="bins",
    objective="generative",
    build=_build,
    classifier=_classifier,
)
