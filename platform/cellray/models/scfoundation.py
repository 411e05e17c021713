"""scFoundation: an encoder over the genes a cell expresses, a linear decoder over all genes.

Architecture and sizes: doi:10.1038/s41592-024-02305-7 and arXiv:2311.15156 (xTrimoGene). Values are
continuous and softly discretised. The encoder reads only genes that have a value and are not
hidden, with two tokens for the wanted and the given read depth; the Performer decoder reads every
gene: the encoder's output where there is one, the embedding of 0 elsewhere, a mask vector where a
value is hidden, each with its gene embedding (a second time for the encoder's genes). The defaults
are those of the published model.

Legend: B cells, T tokens, G genes, S places (genes, then T and S), P tokens the encoder reads laid
end to end, D encoder width, E decoder width, V value bins, M chosen genes of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import nn

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.packing import Packing
from cellray.models._panel import Panel
from cellray.models.base import BuildContext, CellModel, Family, ModelConfig, Preset
from cellray.nn.activations import (
    Activations,
    Work,
    encoder_activations,
    performer_activations,
)
from cellray.nn.attention import Kernel
from cellray.nn.blocks import BlockSpec, Encoder
from cellray.nn.embeddings import SoftBinEmbedding
from cellray.nn.favor import KeyMax, num_features
from cellray.nn.flops import (
    TRAINING,
    linear_flops,
    training_encoder_flops,
    training_performer_flops,
)
from cellray.nn.heads import NormedClassifier
from cellray.nn.init import init_transformer
from cellray.nn.performer import Performer, PerformerSpec

__all__ = ["FAMILY", "Scfoundation", "ScfoundationConfig"]

Tensor = torch.Tensor


class ScfoundationConfig(ModelConfig):
    """Sizes and switches of an scFoundation.

    Attributes:
        family: ``scfoundation``.
        width: D.
        num_layers: encoder blocks.
        num_heads: of the encoder; divides ``width``.
        ffn_width: inner width of the encoder's feed-forward layers.
        dropout: in the encoder.
        decoder_width: E.
        decoder_layers: Performer blocks.
        decoder_heads: of the decoder.
        decoder_head_width: width of a decoder head.
        decoder_ffn_width: inner width of the decoder's feed-forward layers.
        value_bins: V, vectors a value is mixed of.
        bin_alpha: weight of the residual in the value embedding.
        attention: kernel for packed cells, see :func:`cellray.nn.attention.attend`.
        key_max: over what the keys' maximum of the decoder's FAVOR+ is taken: ``cell`` makes a
            cell independent of its batch and equals the source run one cell at a time; ``tensor``
            is the source's.
        redraw_every: optimizer steps between two draws of random features; 0 keeps the first.
        cell_embedding: ``all``: encoder at S, at T, maximum and mean over genes, 4 D numbers;
            ``max``: maximum over all tokens, D numbers.
    """

    family: str = "scfoundation"
    width: int = Field(default=768, ge=1)
    num_layers: int = Field(default=12, ge=1)
    num_heads: int = Field(default=12, ge=1)
    ffn_width: int = Field(default=3072, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    decoder_width: int = Field(default=512, ge=1)
    decoder_layers: int = Field(default=6, ge=1)
    decoder_heads: int = Field(default=8, ge=1)
    decoder_head_width: int = Field(default=64, ge=2)
    decoder_ffn_width: int = Field(default=2048, ge=1)
    value_bins: int = Field(default=100, ge=2)
    bin_alpha: float = 1.0
    attention: Kernel = "auto"
    key_max: KeyMax = "cell"
    redraw_every: int = Field(default=1000, ge=0)
    cell_embedding: Literal["all", "max"] = "all"

    @model_validator(mode="after")
    def _sizes_fit(self) -> ScfoundationConfig:
        if self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}"
            )
        return self


@dataclass(frozen=True)
class _Encoded:
    """What the encoder made of a batch.

    Shapes:
        hidden: (P, D).
        tokens: (P,) places in the flattened batch.
        rows: (P,) number of each token's cell.
        places: (P,) place of each on the panel.
        real: (P,) False at the stand-ins of cells that have nothing to read.
    """

    hidden: Tensor
    tokens: Tensor
    rows: Tensor
    places: Tensor
    real: Tensor


class Scfoundation(CellModel):
    """Predicts hidden values at the raw cell's depth; see :class:`ScfoundationConfig`.

    Capabilities: EmbedsCells, EmbedsGenes, PredictsExpression. They follow the module's mode and
    the caller's gradient mode: call ``eval()`` and use ``torch.no_grad()`` for repeatable results.

    Args:
        config: sizes.
        context: the gene panel, with ``<T>`` and ``<S>``.
    """

    def __init__(self, config: ScfoundationConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.width = config.width * (4 if config.cell_embedding == "all" else 1)
        self.panel = Panel(context.vocab, ["<T>", "<S>"])
        self.fixed_length = self.panel.num_places  # the decoder's, of any cell
        self.values = SoftBinEmbedding(
            config.width, num_bins=config.value_bins, alpha=config.bin_alpha
        )
        # One row more than there are places: padding's, which published weights have, too.
        self.positions = nn.Embedding(self.panel.num_places + 1, config.width)
        self.encoder = Encoder(
            BlockSpec(
                width=config.width,
                num_heads=config.num_heads,
                ffn_width=config.ffn_width,
                dropout=config.dropout,
                attention_dropout=config.dropout,
                inner_dropout=config.dropout,
                kernel=config.attention,
            ),
            num_layers=config.num_layers,
        )
        self.encoder_norm = nn.LayerNorm(config.width)
        self.bridge = nn.Linear(config.width, config.decoder_width)
        self.decoder = Performer(
            PerformerSpec(
                width=config.decoder_width,
                num_layers=config.decoder_layers,
                num_heads=config.decoder_heads,
                head_width=config.decoder_head_width,
                ffn_width=config.decoder_ffn_width,
                bias=True,
                key_max=config.key_max,
                redraw_every=config.redraw_every,
            )
        )
        self.decoder_norm = nn.LayerNorm(config.decoder_width)
        self.output_norm = nn.LayerNorm(config.decoder_width)
        self.to_value = nn.Linear(config.decoder_width, 1)
        self.apply(init_transformer)

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Predicts ``expression`` (M,), in row-major order of ``batch.target_mask``.

        ``hidden`` is the encoder's output, 0 at tokens it does not read. The decoder runs only
        where something is to be predicted.
        """
        places = self.panel.places(batch)
        encoded = self._encode(batch, places)
        flat_TD = encoded.hidden.new_zeros(places.numel(), self.config.width)
        kept_PD = encoded.hidden * encoded.real[:, None]
        hidden = flat_TD.index_copy(0, encoded.tokens, kept_PD).view(*places.shape, -1)
        predictions = {}
        if batch.target_mask is not None:
            decoded_BSE = self._decode(batch, places, encoded)
            at_M = (batch.token_rows() * self.panel.num_places + places)[batch.target_mask]
            chosen_ME = decoded_BSE.flatten(0, 1)[at_M]
            predictions["expression"] = self.to_value(self.output_norm(chosen_ME)).squeeze(-1)
        return ModelOutput(
            hidden=hidden, cell=self._pool(encoded, len(batch)), predictions=predictions
        )

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The encoder over what it reads; with targets the decoder over every cell's panel."""
        config, tokens = self.config, float(np.sum(lengths_B))
        encoder = training_encoder_flops(
            lengths_B,
            num_layers=config.num_layers,
            width=config.width,
            ffn_width=config.ffn_width,
        )
        # lifting, mixing, and the weighted mean of the table's rows
        mixing = linear_flops(self.values) + 2.0 * config.value_bins * config.width
        encoder += TRAINING * mixing * tokens
        if not num_targets:
            return encoder
        places = float(len(lengths_B) * self.panel.num_places)
        decoder = training_performer_flops(
            places,
            num_layers=config.decoder_layers,
            width=config.decoder_width,
            num_heads=config.decoder_heads,
            head_width=config.decoder_head_width,
            ffn_width=config.decoder_ffn_width,
            num_features=num_features(config.decoder_head_width),
        )
        # zeros pass the bridge once for all cells
        bridged = linear_flops(self.bridge) * (tokens + self.panel.num_places)
        head = linear_flops(self.to_value) * num_targets
        return encoder + decoder + TRAINING * (bridged + head)

    def read_lengths(self, batch: CellBatch) -> npt.NDArray[np.int64]:
        """Tokens with a value that is not hidden; 1 where there is none."""
        read = self._read(batch, self.panel.places(batch))
        counts_B = torch.bincount(batch.token_rows()[read].cpu(), minlength=len(batch))
        return np.asarray(counts_B.clamp(min=1).numpy(), dtype=np.int64)

    def activations(self, work: Work) -> Activations:
        """The encoder over what it reads; with targets the decoder over every cell's panel."""
        config = self.config
        share = 1 - work.hidden / max(float(np.sum(work.lengths)) + work.added, 1.0)
        read_B = np.maximum(np.rint(work.lengths * share), 1).astype(np.int64)
        read = replace(work.with_lengths(read_B, packed=True), hidden=0.0)
        encoder = encoder_activations(
            read,
            num_layers=config.num_layers,
            width=config.width,
            num_heads=config.num_heads,
            ffn_width=config.ffn_width,
            dropout=config.dropout,
            attention_dropout=config.dropout,
            inner_dropout=config.dropout,
        )
        # mixing of values; the last norm; its output where the decoder and the pool take it
        around = read.tokens * (3.0 * work.wide * config.value_bins + 4 * 4 * config.width)
        encoder += Activations(around + work.weights(self))
        if not work.targets:
            return encoder
        panel = np.full(work.cells, self.panel.num_places, dtype=np.int64)
        panel_work = work.with_lengths(panel, packed=False)
        decoder = performer_activations(
            panel_work,
            num_layers=config.decoder_layers,
            width=config.decoder_width,
            num_heads=config.decoder_heads,
            head_width=config.decoder_head_width,
            ffn_width=config.decoder_ffn_width,
            num_features=num_features(config.decoder_head_width),
        )
        last = panel_work.tokens * config.decoder_width * 2.0 * work.norm
        return encoder + decoder + Activations(last)

    def embed_cells(self, batch: CellBatch) -> Tensor:
        """See ``config.cell_embedding``; (B, 4 D) or (B, D) float32; the decoder does not run."""
        places = self.panel.places(batch)
        return self._pool(self._encode(batch, places), len(batch)).float()

    def embed_genes(self) -> Tensor:
        """The gene table in vocabulary order, without cell context, (G, D)."""
        return self.positions.weight[: self.panel.num_genes]

    def embed_genes_of_cells(self, batch: CellBatch) -> Tensor:
        """Every gene in the context of its cell: the decoder's last state, (B, G, E) float32."""
        places = self.panel.places(batch)
        decoded_BSE = self._decode(batch, places, self._encode(batch, places))
        genes_BGE: Tensor = self.output_norm(decoded_BSE[:, : self.panel.num_genes])
        return genes_BGE.float()

    def predict_expression(self, batch: CellBatch) -> Tensor:
        """Log-normalised value of every gene at the depth that ``<T>`` asks for, (B, G) float32."""
        values_BG: Tensor = self.to_value(self.embed_genes_of_cells(batch)).squeeze(-1)
        return values_BG.float()

    def _read(self, batch: CellBatch, places: Tensor) -> Tensor:
        """Of ``token_ids``' shape, True at tokens the encoder reads."""
        read = (batch.values > 0) & (places < self.panel.num_places)
        return read if batch.unknown_mask is None else read & ~batch.unknown_mask

    def _encode(self, batch: CellBatch, places: Tensor) -> _Encoded:
        rows, read = batch.token_rows().reshape(-1), self._read(batch, places).reshape(-1)
        count_B = torch.bincount(rows[read], minlength=len(batch))
        # A cell with nothing to read gets its first token as a stand-in.
        empty_B = count_B == 0
        if batch.packing is not None:
            first_B = batch.packing.starts
        else:
            first_B = torch.arange(len(batch), device=rows.device) * places.shape[1]
        kept = read.clone()
        kept[first_B[empty_B]] = True
        tokens_P = torch.nonzero(kept).squeeze(-1)
        real_P = read[tokens_P]
        places_P = torch.where(real_P, places.reshape(-1)[tokens_P], self.panel.num_places)
        values_P = batch.values.reshape(-1)[tokens_P]
        lengths = count_B.clamp(min=1).cpu().numpy()
        packing = Packing.of(lengths).to(rows.device)
        embedded_PD = self.values(values_P, pad=~real_P) + self.positions(places_P)
        hidden_PD = self.encoder(embedded_PD, real_P, packing=packing)
        return _Encoded(self.encoder_norm(hidden_PD), tokens_P, rows[tokens_P], places_P, real_P)

    def _decode(self, batch: CellBatch, places: Tensor, encoded: _Encoded) -> Tensor:
        """(B, S, E). The bridge is linear: zeros pass it once for all cells of the batch."""
        num = self.panel.num_places
        zero_D = self.values(batch.values.new_zeros(1))[0]
        every_S = torch.arange(num, device=places.device)
        base_SE = self.bridge(self.positions(every_S) + zero_D)
        flat = base_SE.expand(len(batch), -1, -1).flatten(0, 1)
        real = encoded.real
        seen_PE = self.bridge((encoded.hidden + self.positions(encoded.places))[real])
        at_P = (encoded.rows * num + encoded.places)[real]
        if batch.unknown_mask is not None:
            hidden_M = batch.unknown_mask & (places < num)
            mask_D = self.values(batch.values.new_zeros(1), mask=True)[0]
            mask_ME = self.bridge(mask_D + self.positions(places[hidden_M]))
            seen_PE = torch.cat([seen_PE, mask_ME.to(seen_PE.dtype)])
            at_P = torch.cat([at_P, (batch.token_rows() * num + places)[hidden_M]])
        flat = flat.index_copy(0, at_P, seen_PE.to(flat.dtype))
        decoded_BSE = self.decoder(flat.view(len(batch), num, -1), step=batch.step)
        normed_BSE: Tensor = self.decoder_norm(decoded_BSE)
        return normed_BSE

    def _pool(self, encoded: _Encoded, num_cells: int) -> Tensor:
        hidden, genes = encoded.hidden, self.panel.num_genes
        if self.config.cell_embedding == "max":
            return _largest(hidden, encoded.rows, encoded.real, num_cells)
        is_gene = encoded.real & (encoded.places < genes)
        parts = [
            _total(hidden, encoded.rows, encoded.real & (encoded.places == place), num_cells)[0]
            for place in (genes + 1, genes)
        ]
        parts.append(_largest(hidden, encoded.rows, is_gene, num_cells))
        total_BD, count_B1 = _total(hidden, encoded.rows, is_gene, num_cells)
        return torch.cat([*parts, total_BD / count_B1.clamp(min=1)], dim=1)


def _total(hidden: Tensor, rows: Tensor, where: Tensor, num_cells: int) -> tuple[Tensor, Tensor]:
    """Sum over each cell's tokens at ``where``, (B, D), and how many they are, (B, 1)."""
    sums_BD = hidden.new_zeros(num_cells, hidden.shape[1])
    sums_BD = sums_BD.index_add(0, rows[where], hidden[where])
    return sums_BD, torch.bincount(rows[where], minlength=num_cells)[:, None]


def _largest(hidden: Tensor, rows: Tensor, where: Tensor, num_cells: int) -> Tensor:
    """Maximum over each cell's tokens at ``where``, (B, D); 0 where it has none."""
    start_BD = hidden.new_zeros(num_cells, hidden.shape[1])
    index = rows[where][:, None].expand(-1, hidden.shape[1])
    return start_BD.scatter_reduce(0, index, hidden[where], "amax", include_self=False)


def _build(config: ScfoundationConfig, context: BuildContext) -> Scfoundation:
    """Raises DataError if the vocabulary lacks ``<T>`` or ``<S>``."""
    return Scfoundation(config, context)


def _classifier(config: ScfoundationConfig, context: BuildContext, num_classes: int) -> nn.Module:
    width = config.width * (4 if config.cell_embedding == "all" else 1)
    return NormedClassifier(width, num_classes=num_classes)


FAMILY = Family(
    name="scfoundation",
    config=ScfoundationConfig,
    tokenizer="depth",
    objective="depth",
    build=_build,
    classifier=_classifier,
    presets={
        "100M": Preset(
            model={},
            tokenizer={"max_tokens": 15_000},
            num_genes=19_264,
            specials=("<T>", "<S>", "<pad>"),
            num_parameters=119_252_285,
            source="doi:10.1038/s41592-024-02305-7",
        )
    },
)
