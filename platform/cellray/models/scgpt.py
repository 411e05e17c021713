"""scGPT: a transformer over a cell's genes with their binned values, trained generatively.

Architecture and sizes: doi:10.1038/s41592-024-02201-0 and its published code. A token is the sum of
a gene embedding and a value embedding (or, where the value is hidden, a flag), plus condition
embeddings if the run asks for them. No positions: the order of genes carries nothing. The cell is
the output at ``<cls>``, the first token. The defaults are those of the whole-human model; the
switches of the integration recipe (batch labels, domain norm, adversary, zero probabilities) are
off.

Legend: B cells, T tokens, D width, H heads, G genes, M hidden tokens of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput, unpack
from cellray.core.errors import ConfigError, DataError, did_you_mean
from cellray.models._generation import generate_values
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig, Preset, Recipe
from cellray.nn.activations import Activations, Work, encoder_activations
from cellray.nn.attention import Kernel
from cellray.nn.blocks import Activation, BlockSpec, Encoder
from cellray.nn.domain import BatchAdversary, BatchLabels, DomainNorm
from cellray.nn.embeddings import ConditionEmbedding, ContinuousValueEncoder, NormedEmbedding
from cellray.nn.flops import TRAINING, linear_flops, training_encoder_flops
from cellray.nn.heads import CellGeneDecoder, ExpressionDecoder, MlpClassifier
from cellray.nn.init import init_transformer

__all__ = ["FAMILY", "Scgpt", "ScgptConfig"]

Tensor = torch.Tensor

_CLASSIFIER_HIDDEN = 2
_TABLE_RANGE = 0.1
_GENES_PER_CHUNK = 8_192
_NEVER = 1_000_000_000  # steps


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
        conditions: covariates (batch, modality, perturbation ...) whose embeddings are added to
            every token; ``data.covariates`` must name them.
        modality_tokens: add an embedding of what a token's gene was measured by (RNA, ATAC,
            protein); the vocabulary must say it.
        batch_key: covariate that names the technical batch, for the three switches below.
        batch_labels: let the decoders see the batch, beside the encoder's output.
        domain_norm: batch norm of the summed embeddings: ``none``, ``shared`` by all cells, or one
            for each ``domain`` (technical batch).
        adversary: a discriminator of batches on reversed gradients (DAR).
        domain_affine: the domain norm has weights of its own, too.
        flag: have the flag that marks hidden genes; fine-tuned published models have none, and
            hide by value (``objective.hide = "value"``).
        gepc: have the decoder of values from the cell embedding.
        expressed: decoders also say how likely a gene is expressed at all (zero probabilities).
        gen_out_proj: apply the attention's output projection at hidden tokens, too. False is the
            original's slip, under which its published weights were trained.
        attention: kernel for packed cells, see :func:`cellray.nn.attention.attend`.
    """

    family: str = "scgpt"
    width: int = Field(default=512, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=8, ge=1)
    ffn_width: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.2, ge=0.0, lt=1.0)
    activation: Activation = "relu"
    conditions: list[str] = []
    modality_tokens: bool = False
    batch_key: str = ""
    batch_labels: bool = False
    domain_norm: Literal["none", "shared", "domain"] = "none"
    domain_affine: bool = False
    adversary: bool = False
    flag: bool = True
    gepc: bool = True
    expressed: bool = False
    gen_out_proj: bool = True
    attention: Kernel = "auto"

    @model_validator(mode="after")
    def _sizes_fit(self) -> ScgptConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}"
            )
        wants = [
            key
            for key, on in (
                ("batch_labels", self.batch_labels),
                ("domain_norm", self.domain_norm == "domain"),
                ("adversary", self.adversary),
            )
            if on
        ]
        if wants and not self.batch_key:
            raise ValueError(
                f"{', '.join(wants)}: needs batch_key, the covariate that names the technical batch"
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
        self.flag = nn.Embedding(2, config.width) if config.flag else None
        self.conditions = nn.ModuleDict(
            {
                name: ConditionEmbedding(context.covariates[name], width=config.width)
                for name in config.conditions
            }
        )
        self.modalities: ConditionEmbedding | None = None
        if config.modality_tokens:
            kinds = sorted(set(vocab.modalities or ()))
            self.modalities = ConditionEmbedding(len(kinds), width=config.width)
            self._modality_of = torch.full((vocab.num_tokens,), -1, device="cpu")
            codes = [kinds.index(kind) for kind in vocab.modalities or ()]
            self._modality_of[vocab.gene_tokens.tolist()] = torch.tensor(codes, device="cpu")
        batches = context.covariates[config.batch_key] if config.batch_key else 1
        self.batch_labels = (
            BatchLabels(batches, width=config.width) if config.batch_labels else None
        )
        self.domain_norm: DomainNorm | None = None
        if config.domain_norm != "none":
            domains = batches if config.domain_norm == "domain" else 1
            self.domain_norm = DomainNorm(
                config.width, num_domains=domains, affine=config.domain_affine
            )
        spec = BlockSpec(
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            inner_dropout=config.dropout,
            project_unknown=config.gen_out_proj,
            kernel=config.attention,
        )
        self.encoder = Encoder(spec, num_layers=config.num_layers)
        inputs, expressed = 1 + config.batch_labels, config.expressed
        self.expression = ExpressionDecoder(config.width, num_inputs=inputs, expressed=expressed)
        self.expression_from_cell = (
            CellGeneDecoder(config.width, num_inputs=inputs, expressed=expressed)
            if config.gepc
            else None
        )
        self.adversary = (
            BatchAdversary(config.width, num_batches=batches) if config.adversary else None
        )
        self.apply(init_transformer)
        nn.init.uniform_(self.genes.table.weight, -_TABLE_RANGE, _TABLE_RANGE)
        self._pad = vocab.pad
        self._gene_tokens = torch.tensor(vocab.gene_tokens.tolist(), device="cpu")

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts the values at ``batch.target_mask``, (M,) each, in row-major order.

        ``expression`` from the token's own hidden state, ``expression_from_cell`` from the cell and
        gene embeddings, and with ``batch.cell_prompt`` also ``expression_cell_prompt``, from a
        second pass in which the detached cell embedding stands in the place of ``<cls>``. With
        ``config.expressed`` the logits of being expressed go beside the first two; with
        ``config.adversary`` there are ``batch_logits`` (B, C) and ``batch_codes`` (B,).
        """
        genes_BTD = self.genes(batch.token_ids)
        embedded_BTD = self._embed(batch, genes_BTD)
        hidden_BTD = self._encode(batch, embedded_BTD)
        cell_BD = batch.first_tokens(hidden_BTD)
        predictions: dict[str, Tensor] = {}
        where = batch.target_mask
        if where is not None:
            rows_M = batch.token_rows()[where]
            labels_BD = self._labels(batch)
            seen = _beside(hidden_BTD[where], None if labels_BD is None else labels_BD[rows_M])
            genes_MD, cells = genes_BTD[where], _beside(cell_BD, labels_BD)[rows_M]
            predictions["expression"] = self.expression(seen)
            logits = self.expression.expressed_logit(seen)
            if logits is not None:
                predictions["expressed_logit"] = logits
            if self.expression_from_cell is not None:
                predictions["expression_from_cell"] = self.expression_from_cell(genes_MD, cells)
                from_cell = self.expression_from_cell.expressed_logit(genes_MD, cells)
                if from_cell is not None:
                    predictions["expressed_logit_from_cell"] = from_cell
            if batch.cell_prompt:
                prompt_BD = cell_BD.detach().to(embedded_BTD.dtype)
                prompted_BTD = batch.with_first_tokens(embedded_BTD, prompt_BD)
                again_MD = self._encode(batch, prompted_BTD)[where]
                second = _beside(again_MD, None if labels_BD is None else labels_BD[rows_M])
                predictions["expression_cell_prompt"] = self.expression(second)
            if self.adversary is not None:
                predictions["batch_logits"] = self.adversary(cell_BD)
                predictions["batch_codes"] = self._codes(batch)
        return ModelOutput(hidden=hidden_BTD, cell=cell_BD, predictions=predictions)

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The encoder, twice with a cell prompt; values' layers at tokens, decoders at targets."""
        config, passes = self.config, 2 if cell_prompt and num_targets else 1
        encoder = training_encoder_flops(
            lengths_B,
            num_layers=config.num_layers,
            width=config.width,
            ffn_width=config.ffn_width,
        )
        per_target = passes * linear_flops(self.expression)
        per_target += linear_flops(self.expression_from_cell)
        values = linear_flops(self.values) * float(np.sum(lengths_B))
        told = linear_flops(self.adversary) * len(lengths_B) if num_targets else 0.0
        return passes * encoder + TRAINING * (values + per_target * num_targets + told)

    def activations(self, work: Work) -> Activations:
        """The encoder, twice with a cell prompt; two embeddings' norms; decoders at targets."""
        config, width = self.config, self.config.width
        encoder = encoder_activations(
            work,
            num_layers=config.num_layers * (2 if work.cell_prompt and work.targets else 1),
            width=width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            activation=config.activation,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            inner_dropout=config.dropout,
        )
        embedded = work.tokens * width * (2 * 4.0 + work.wide + work.mask * bool(config.dropout))
        decoders = work.targets * width * 9.0 * work.wide
        return encoder + Activations(embedded + decoders + work.weights(self))

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
        decoder = self._gepc()
        cell_BD = _beside(self.embed_cells(batch), self._labels(batch)).float()
        tokens_G = self._gene_tokens.to(cell_BD.device)
        parts = []
        for start in range(0, len(tokens_G), _GENES_PER_CHUNK):
            genes_D = self.genes(tokens_G[start : start + _GENES_PER_CHUNK])
            queries = decoder.queries(genes_D)
            with torch.autocast(cell_BD.device.type, enabled=False):
                parts.append(cell_BD @ queries.float().T)
        return torch.cat(parts, dim=1)

    def generate(
        self, batch: CellBatch, *, num_iterations: int, cell_prompt: Tensor | None = None
    ) -> Tensor:
        """Fill in the values at ``batch.unknown_mask``, a share of them at a time.

        In each of K iterations the most confident ``1 / K`` of a cell's unknown genes become known
        to the next (doi:10.1038/s41592-024-02201-0; no published code has it). The article leaves
        confidence open; here a gene is the more confident, the closer its two predictions (GEP and
        GEPC) are.

        Args:
            batch: with ``unknown_mask``; values at it are not looked at.
            num_iterations: K; 1 predicts everything at once.
            cell_prompt: (B, D) cell embeddings to stand in the place of ``<cls>``, for cells of
                which nothing else is known; None lets ``<cls>`` be computed.

        Returns:
            Values of ``token_ids``' shape, float32: given ones as they are, unknown ones predicted.

        Raises:
            ConfigError: ``num_iterations`` is below 1.
            DataError: the batch has no ``unknown_mask``.
        """
        return generate_values(self, batch, num_iterations=num_iterations, cell_prompt=cell_prompt)

    def predict_unknown(
        self, batch: CellBatch, cell_prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """GEP's and GEPC's value at every unknown token, (U,) each, in row-major order."""
        genes_BTD = self.genes(batch.token_ids)
        embedded_BTD = self._embed(batch, genes_BTD)
        if cell_prompt is not None:
            prompt_BD = cell_prompt.to(embedded_BTD)
            embedded_BTD = batch.with_first_tokens(embedded_BTD, prompt_BD)
        hidden_BTD = self._encode(batch, embedded_BTD)
        where = batch.unknown_mask
        assert where is not None, "generate_values checks it"
        rows_U, labels_BD = batch.token_rows()[where], self._labels(batch)
        cell_BD = cell_prompt if cell_prompt is not None else batch.first_tokens(hidden_BTD)
        seen = _beside(hidden_BTD[where], None if labels_BD is None else labels_BD[rows_U])
        cells = _beside(cell_BD.to(hidden_BTD), labels_BD)[rows_U]
        return self.expression(seen), self._gepc()(genes_BTD[where], cells)

    def _gepc(self) -> CellGeneDecoder:
        if self.expression_from_cell is None:
            raise ConfigError(
                "this scGPT has no decoder of values from the cell (model.gepc = false), which "
                "predicting every gene and generating need"
            )
        return self.expression_from_cell

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
            if self.flag is None:
                raise ConfigError(
                    "this scGPT has no flag for hidden genes (model.flag = false); hide them by "
                    "value: objective.hide = 'value'"
                )
            flag_D = self.flag(torch.ones((), dtype=torch.long, device=genes_BTD.device))
            unknown_BT1 = batch.unknown_mask[..., None]
            second_BTD = torch.where(unknown_BT1, flag_D.to(second_BTD.dtype), second_BTD)
        embedded_BTD: Tensor = genes_BTD + second_BTD
        for name, table in self.conditions.items():
            embedded_BTD = embedded_BTD + batch.to_tokens(table(self._covariate(batch, name)))
        if self.modalities is not None:
            codes = self._modality_of.to(batch.token_ids.device)[batch.token_ids]
            embedded_BTD = embedded_BTD + self.modalities(codes)
        if self.domain_norm is not None:
            rows = batch.token_rows()
            domains = torch.zeros_like(rows)
            if self.config.domain_norm == "domain":
                domains = self._codes(batch)[rows]
            embedded_BTD = self.domain_norm(embedded_BTD, domains, batch.attention_mask)
        return embedded_BTD

    def _codes(self, batch: CellBatch) -> Tensor:
        """(B,) technical batch of each cell."""
        return self._covariate(batch, self.config.batch_key)

    def _labels(self, batch: CellBatch) -> Tensor | None:
        """(B, D) embedding of each cell's technical batch, None if decoders do not see it."""
        return None if self.batch_labels is None else self.batch_labels(self._codes(batch))

    @staticmethod
    def _covariate(batch: CellBatch, name: str) -> Tensor:
        if name not in batch.covariates:
            raise DataError(
                f"the model reads the covariate '{name}', but the batch carries "
                f"{sorted(batch.covariates)}; add '{name}' to data.covariates"
            )
        return batch.covariates[name]


def _beside(left: Tensor, right: Tensor | None) -> Tensor:
    """Two tensors joined along the last axis; the left one alone if there is no right one."""
    return left if right is None else torch.cat([left, right.to(left.dtype)], dim=-1)


def _build(config: ScgptConfig, context: BuildContext) -> Scgpt:
    """Raises ConfigError if a condition or the batch key is not a covariate of the run."""
    wanted = {f"model.conditions = '{name}'": name for name in config.conditions}
    if config.batch_key:
        wanted[f"model.batch_key = '{config.batch_key}'"] = config.batch_key
    if config.modality_tokens and not context.vocab.modalities:
        raise ConfigError(
            "model.modality_tokens = true, but the vocabulary does not say what its genes were "
            "measured by; give one made with Vocab.with_modalities as data.vocab, or leave it out"
        )
    allowed = sorted(context.covariates)
    for key, name in wanted.items():
        if name not in context.covariates:
            raise ConfigError(
                f"{key} is not a covariate of this run.{did_you_mean(name, allowed)} "
                f"data.covariates has: {', '.join(allowed) or 'none'}"
            )
    return Scgpt(config, context)


def _classifier(config: ScgptConfig, context: BuildContext, num_classes: int) -> nn.Module:
    return MlpClassifier(config.width, num_classes=num_classes, num_hidden=_CLASSIFIER_HIDDEN)


def _integration(batch: str, num_genes: int) -> Recipe:
    """All genes with their zeros, 40 % hidden by value; DSBN, batch labels, ECS, DAR."""
    return Recipe(
        model={
            "batch_key": batch,
            "batch_labels": True,
            "domain_norm": "domain",
            "adversary": True,
            "expressed": True,
            "flag": False,
        },
        tokenizer={"include_zeros": True, "cls_value": 0.0, "max_tokens": num_genes + 1},
        objective={
            "hide": "value",
            "mask_ratios": [0.4],
            "cell_prompt_after_steps": _NEVER,
            "ecs_weight": 10.0,
            "dar_weight": 1.0,
        },
        source="doi:10.1038/s41592-024-02201-0, batch integration",
    )


def _keep_genes(weights: Mapping[str, Tensor], tokens: npt.NDArray[np.int64]) -> dict[str, Tensor]:
    table = "genes.table.weight"
    return {**weights, table: weights[table][torch.from_numpy(tokens)]}


FAMILY = Family(
    name="scgpt",
    config=ScgptConfig,
    tokenizer="bins",
    objective="generative",
    build=_build,
    classifier=_classifier,
    presets={
        "whole-human": Preset(
            model={},
            tokenizer={"max_tokens": 1200, "num_bins": 51},
            num_genes=60_694,
            specials=("<pad>", "<cls>", "<eoc>"),
            num_parameters=51_330_049,
            source="doi:10.1038/s41592-024-02201-0",
        ),
        "organ": Preset(
            model={},
            tokenizer={"max_tokens": 1200, "num_bins": 51},
            num_genes=36_571,
            specials=("<pad>", "<cls>", "<eoc>"),
            num_parameters=38_979_073,
            source="doi:10.1038/s41592-024-02201-0",
        ),
    },
    recipes={"integration": _integration},
    keep_genes=_keep_genes,
)
