"""What a model family is, and what a task may ask of a model.

Legend: B cells in a batch, T tokens per cell, D width, G genes in the vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from cellray.core import registry
from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.section import Section
from cellray.data.vocab import Vocab

__all__ = [
    "BuildContext",
    "CellClassifier",
    "CellModel",
    "EmbedsCells",
    "EmbedsGenes",
    "ExposesAttention",
    "Family",
    "ModelConfig",
    "PredictsExpression",
    "build_model",
    "family",
]


class ModelConfig(Section):
    """Keys every family has; each adds its own in its own file."""

    family: str


class CellModel(nn.Module):
    """Base of every family's module: ``forward(batch) -> ModelOutput``."""

    width: int

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Run the model on a batch; predictions only at ``batch.target_mask`` where given."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")


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
        """Attention probabilities of one layer, (B, H, T, T) float32, 0 at padding."""
        ...


@dataclass(frozen=True)
class BuildContext:
    """What the data tell a model about its size.

    Attributes:
        vocab: the gene space.
        covariates: name -> number of categories of each covariate the run carries.
        max_tokens: the tokenizer's longest cell, specials included.
    """

    vocab: Vocab
    covariates: Mapping[str, int] = field(default_factory=dict)
    max_tokens: int = 2048


@dataclass(frozen=True)
class Family:
    """What a family's module exports as ``FAMILY``.

    Attributes:
        name: equals the module's name.
        config: its configuration class.
        tokenizer: key of the tokenizer its source uses.
        objective: key of the objective it is pretrained with.
        build: (config, context) -> model; raises ConfigError if they do not fit.
        classifier: (config, num_classes) -> module from cell embedding (B, D) to logits (B, C).
    """

    name: str
    config: type[ModelConfig]
    tokenizer: str
    objective: str
    build: Callable[[Any, BuildContext], CellModel]
    classifier: Callable[[Any, int], nn.Module]


def family(name: str) -> Family:
    """Find a family by its key or by ``module.path:FAMILY``."""
    found = registry.find("cellray.models", name, "FAMILY")
    assert isinstance(found, Family), f"{name} exports a {type(found).__name__} as FAMILY"
    return found


class CellClassifier(CellModel):
    """A backbone with a classifier on its cell embedding.

    Args:
        backbone: a family's model.
        head: (B, D) -> (B, C) logits.
    """

    def __init__(self, backbone: CellModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.width = backbone.width

    def forward(self, batch: CellBatch) -> ModelOutput:
        """Adds ``class_logits`` (B, C); the backbone sees no targets."""
        bare = replace(batch, targets=None, target_mask=None, unknown_mask=None)
        output: ModelOutput = self.backbone(bare)
        return replace(output, predictions={"class_logits": self.head(output.cell)})


def build_model(
    name: str, config: ModelConfig, context: BuildContext, *, num_classes: int = 0
) -> CellModel:
    """Build a family's model, with a classifier if there are classes."""
    unit = family(name)
    model = unit.build(config, context)
    if num_classes:
        return CellClassifier(model, unit.classifier(config, num_classes))
    return model
