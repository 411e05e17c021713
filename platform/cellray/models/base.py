"""What a model family is, and what a task may ask of a model.

Legend: B cells in a batch, T tokens per cell, D width, G genes in the vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cellray.core import registry
from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.errors import ConfigError, did_you_mean
from cellray.core.section import Section
from cellray.data.vocab import Vocab
from cellray.nn.activations import Activations, Work
from cellray.nn.flops import TRAINING, linear_flops

__all__ = [
    "BuildContext",
    "CellClassifier",
    "CellModel",
    "EmbedsCells",
    "EmbedsGenes",
    "ExposesAttention",
    "Family",
    "GeneClassifier",
    "ModelConfig",
    "PredictsExpression",
    "Preset",
    "Recipe",
    "begin",
    "build_model",
    "family",
    "with_preset",
]


class ModelConfig(Section):
    """Keys every family has; each adds its own in its own file.

    Attributes:
        family: the family's key.
        preset: published model whose sizes (and tokenizer keys) fill in what is not given; "" none.
    """

    family: str
    preset: str = ""


class CellModel(nn.Module):
    """Base of every family's module: ``forward(batch) -> ModelOutput``.

    Attributes:
        width: numbers of a cell embedding.
        fixed_length: tokens the model reads whatever a cell holds (a panel, pathways); 0 if it
            reads the cell's own.
        linear_attention: whether memory grows with the number of tokens, not its square.
    """

    width: int
    fixed_length: int = 0
    linear_attention: bool = False

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Run the model on a batch; predictions only at ``batch.target_mask`` where given."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """Operations that a forward and a backward pass over these cells need.

        Counted as :mod:`cellray.nn.flops` says, as if every weight were trained. 0 means that the
        family does not count, and that nothing can be said about its utilisation.

        Args:
            lengths_B: tokens of each cell that the model reads, see :meth:`read_lengths`.
            num_targets: positions predicted at, of all cells; 0 where nothing is to be predicted.
            cell_prompt: whether the batch asks for the second pass prompted by the cell embedding.
        """
        return 0.0

    def activations(self, work: Work) -> Activations:
        """Bytes that a training pass over a micro-batch needs beside weights and gradients.

        Counted as :mod:`cellray.nn.activations` says; nothing means that the family does not count.
        """
        return Activations()

    def read_lengths(self, batch: CellBatch) -> npt.NDArray[np.int64]:
        """Tokens of each cell that the model reads, (B,): all that are not padding."""
        rows = batch.token_rows()[batch.attention_mask].cpu()
        counts_B = torch.bincount(rows, minlength=len(batch))
        return np.asarray(counts_B.numpy(), dtype=np.int64)

    def batch_flops(self, batch: CellBatch) -> float:
        """:meth:`training_flops` of a batch that an objective has prepared."""
        lengths_B = self.read_lengths(batch)
        return self.training_flops(lengths_B, batch.num_targets, cell_prompt=batch.cell_prompt)


@runtime_checkable
class EmbedsCells(Protocol):
    """Gives a vector per cell without training a head."""

    def embed_cells(self, batch: CellBatch) -> torch.Tensor:
        """Zero-shot cell embeddings, (B, D) float32."""
        ...


@runtime_checkable
class EmbedsGenes(Protocol):
    """Gives a vector per gene of the vocabulary."""

    def embed_genes(self) -> torch.Tensor:
        """Static gene embeddings in vocabulary order, (G, D)."""
        ...


@runtime_checkable
class PredictsExpression(Protocol):
    """Predicts the value of every gene of the vocabulary from the cell."""

    def predict_expression(self, batch: CellBatch) -> torch.Tensor:
        """Predicted values in the unit the model was trained on, (B, G) float32."""
        ...


@runtime_checkable
class ExposesAttention(Protocol):
    """Shows what its tokens attend to."""

    def attention(self, batch: CellBatch, layer: int = -1) -> torch.Tensor:
        """Attention probabilities of one layer, (B, H, T, T) float32, 0 at padding.

        T are the batch's tokens, or, for a model with a sequence of its own (a fixed gene panel,
        pathways), that sequence, which has no padding.
        """
        ...


@dataclass(frozen=True)
class BuildContext:
    """What the data tell a model about its size.

    Attributes:
        vocab: the gene space.
        covariates: name -> number of categories of each covariate the run carries.
        max_tokens: the tokenizer's longest cell, specials included.
        tokenizer: the tokenizer's configuration, where it is known.
    """

    vocab: Vocab
    covariates: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 2048
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """The sizes of a published model.

    Attributes:
        model: keys of ``[model]``.
        tokenizer: keys of ``[tokenizer]``.
        num_genes: genes of its vocabulary.
        specials: special tokens of its vocabulary.
        num_parameters: values of its published weights, tied ones once; 0 if none are published.
        source: where the sizes stand.
    """

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    num_genes: int
    specials: tuple[str, ...]
    num_parameters: int
    source: str


@dataclass(frozen=True)
class Recipe:
    """How a family's source fine-tunes for a task: keys laid over those of a checkpoint.

    Attributes:
        model: keys of ``[model]``.
        tokenizer: keys of ``[tokenizer]``.
        objective: keys of ``[objective]``; without ``name`` it is the family's own.
        source: where it stands.
    """

    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    objective: Mapping[str, Any]
    source: str


def _as_it_is(config: Any, vocab: Vocab) -> Vocab:
    return vocab


def _nothing(config: Any, vocab: Vocab) -> dict[str, torch.Tensor]:
    return {}


@dataclass(frozen=True)
class Family:
    """What a family's module exports as ``FAMILY``.

    Attributes:
        name: equals the module's name.
        config: its configuration class.
        tokenizer: key of the tokenizer its source uses.
        objective: key of the objective it is pretrained with.
        build: (config, context) -> model; raises ConfigError if they do not fit.
        classifier: (config, context, num_classes) -> module from what ``head_reads`` names to
            logits (B, C).
        head_reads: the classifier's input: ``cell`` (B, D), or ``panel`` (B, S, D), the hidden
            states of the model's own sequence.
        gene_classifier: (config, context, num_classes) -> module from hidden states (..., D) to
            logits (..., C) of every token, None where the source has none.
        presets: name -> published sizes.
        prepare: (config, vocab) -> the gene space of a new model, with what the family adds to it
            (gene sets); called on the driver, so that files are read once.
        start: (config, vocab) -> weights that a new model starts with (a published gene table),
            under the model's own names; called on the driver.
        refuse_below: a cell whose best class has a lower probability is not annotated; 0 never.
        recipes: name -> (covariate with the technical batch, genes of the vocabulary) -> recipe.
        keep_genes: (weights, token ids to keep in their new order) -> weights of a model over those
            tokens alone; None where the family cannot.
    """

    name: str
    config: type[ModelConfig]
    tokenizer: str
    objective: str
    build: Callable[[Any, BuildContext], CellModel]
    classifier: Callable[[Any, BuildContext, int], nn.Module]
    head_reads: Literal["cell", "panel"] = "cell"
    gene_classifier: Callable[[Any, BuildContext, int], nn.Module] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)
    prepare: Callable[[Any, Vocab], Vocab] = _as_it_is
    start: Callable[[Any, Vocab], dict[str, torch.Tensor]] = _nothing
    refuse_below: float = 0.0
    recipes: Mapping[str, Callable[[str, int], Recipe]] = field(default_factory=dict)
    keep_genes: (
        Callable[[Mapping[str, torch.Tensor], npt.NDArray[np.int64]], dict[str, torch.Tensor]]
        | None
    ) = None


def begin(config: ModelConfig, vocab: Vocab) -> tuple[Vocab, dict[str, torch.Tensor] | None]:
    """The gene space of a new model, and the weights it starts with besides drawn ones.

    Raises:
        CellrayError: a file that the configuration names is missing or does not fit the genes.
    """
    unit = family(config.family)
    vocab = unit.prepare(config, vocab)
    return vocab, unit.start(config, vocab) or None


def with_preset(
    unit: Family, model: Mapping[str, Any], tokenizer: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``[model]`` and ``[tokenizer]`` tables with what ``model.preset`` fills in.

    Keys that are given stay as they are.

    Raises:
        ConfigError: the family has no such preset.
    """
    name = str(model.get("preset") or "")
    if not name:
        return dict(model), dict(tokenizer)
    if name not in unit.presets:
        raise ConfigError(
            f"model.preset = '{name}' is no preset of {unit.name}."
            f"{did_you_mean(name, unit.presets)} It has: {', '.join(unit.presets) or 'none'}"
        )
    preset = unit.presets[name]
    return {**preset.model, **model}, {**preset.tokenizer, **tokenizer}


def family(name: str) -> Family:
    """Find a family by its key or by ``module.path:FAMILY``."""
    found = registry.find("cellray.models", name, "FAMILY")
    assert isinstance(found, Family), f"{name} exports a {type(found).__name__} as FAMILY"
    return found


class CellClassifier(CellModel):
    """A backbone with a classifier on its cell embedding.

    Args:
        backbone: a family's model.
        head: what ``reads`` names -> (B, C) logits.
        reads: ``cell``, the cell embedding (B, D), or ``panel``, the hidden states of the model's
            own sequence (B, S, D).
    """

    def __init__(
        self, backbone: CellModel, head: nn.Module, reads: Literal["cell", "panel"] = "cell"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.reads = reads
        self.width = backbone.width
        self.fixed_length = backbone.fixed_length
        self.linear_attention = backbone.linear_attention

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Adds ``class_logits`` (B, C); the backbone sees no targets."""
        bare = replace(batch, targets=None, target_mask=None, unknown_mask=None)
        output: ModelOutput = self.backbone(bare)
        seen = output.cell if self.reads == "cell" else output.panel
        assert seen is not None, "a family whose head reads the panel gives one"
        return replace(output, predictions={"class_logits": self.head(seen)})

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The backbone's, and the head's linear layers once a cell."""
        backbone = self.backbone.training_flops(lengths_B, 0)
        return backbone + TRAINING * linear_flops(self.head) * len(lengths_B)

    def activations(self, work: Work) -> Activations:
        """The backbone's, which sees no targets; a head of classes is small beside it."""
        return self.backbone.activations(replace(work, targets=0.0, hidden=0.0, added=0.0))

    def read_lengths(self, batch: CellBatch) -> npt.NDArray[np.int64]:
        """What the backbone reads."""
        return self.backbone.read_lengths(batch)


class GeneClassifier(CellModel):
    """A backbone with a classifier on every token: gene classification.

    Args:
        backbone: a family's model.
        head: (..., D) -> (..., C) logits.
    """

    def __init__(self, backbone: CellModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.width = backbone.width

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Adds ``gene_logits`` of the hidden states' shape; the backbone sees no targets."""
        bare = replace(batch, targets=None, target_mask=None, unknown_mask=None)
        output: ModelOutput = self.backbone(bare)
        return replace(output, predictions={"gene_logits": self.head(output.hidden)})

    def training_flops(
        self, lengths_B: npt.NDArray[np.int64], num_targets: float, *, cell_prompt: bool = False
    ) -> float:
        """The backbone's, and the head's linear layers at every token."""
        backbone = self.backbone.training_flops(lengths_B, 0)
        return backbone + TRAINING * linear_flops(self.head) * float(np.sum(lengths_B))

    def activations(self, work: Work) -> Activations:
        """The backbone's, which sees no targets; a head of classes is small beside it."""
        return self.backbone.activations(replace(work, targets=0.0, hidden=0.0, added=0.0))

    def read_lengths(self, batch: CellBatch) -> npt.NDArray[np.int64]:
        """What the backbone reads."""
        return self.backbone.read_lengths(batch)


def build_model(
    name: str,
    config: ModelConfig,
    context: BuildContext,
    *,
    num_classes: int = 0,
    classes_of: str = "cell",
) -> CellModel:
    """Build a family's model, with a classifier of cells or genes if there are classes.

    Raises:
        ConfigError: the family has no classifier of genes, and one is asked for.
    """
    unit = family(name)
    model = unit.build(config, context)
    if not num_classes:
        return model
    if classes_of == "gene":
        if unit.gene_classifier is None:
            raise ConfigError(f"family '{unit.name}' has no classifier of genes")
        return GeneClassifier(model, unit.gene_classifier(config, context, num_classes))
    head = unit.classifier(config, context, num_classes)
    return CellClassifier(model, head, unit.head_reads)
