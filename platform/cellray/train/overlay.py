"""What a task lays over the model it starts from: objective, genes, keys of model and tokenizer.

A checkpoint that lacks what a recipe adds (norms per batch, an adversary, a second output of a
decoder) is taken as far as it fits: tensors of the same name and shape are kept, the others are
drawn anew by the run's seed, and both are named. A checkpoint that does not fit its own
configuration is refused as ever.

Legend: G genes of the vocabulary, K kept genes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from cellray.core import registry
from cellray.core.errors import ConfigError
from cellray.core.section import merge
from cellray.data.variable import GeneMoments, choose_variable_by_batch
from cellray.data.vocab import Vocab
from cellray.models.base import Family, Recipe, family
from cellray.tasks.base import OWN, Targets
from cellray.train.checkpoint import Manifest, model_of
from cellray.train.job import fitting_weights
from cellray.train.prepare import Cells, gene_map, sample_cells

__all__ = ["Start", "lay_over"]

I64 = npt.NDArray[np.int64]

_BLOCK_CELLS = 4096
_LEAST_CELLS = 20  # a smaller batch does not propose variable genes


@dataclass(frozen=True)
class Start:
    """What a fine-tuning starts with.

    Attributes:
        manifest: configuration of model, tokenizer and objective.
        vocab: the gene space.
        weights: name -> tensor, None where all are drawn.
        said: what the user should know of the change.
    """

    manifest: Manifest
    vocab: Vocab
    weights: Mapping[str, torch.Tensor] | None
    said: tuple[str, ...] = ()


def _with_recipe(name: str) -> list[str]:
    return [f for f in registry.names("cellray.models") if name in family(f).recipes]


def _recipe(unit: Family, targets: Targets, num_genes: int) -> Recipe | None:
    """The family's recipe that the task asks for.

    Raises:
        ConfigError: the family has none.
    """
    if not targets.recipe:
        return None
    if targets.recipe not in unit.recipes:
        raise ConfigError(
            f"family '{unit.name}' has no recipe for '{targets.recipe}' (families that have one: "
            f"{', '.join(_with_recipe(targets.recipe)) or 'none'}); score its zero-shot embedding "
            "(task.name = 'embedding'), or set task.recipe = 'objective' to go on with its own "
            f"self-supervised objective '{unit.objective}' on these cells"
        )
    return unit.recipes[targets.recipe](targets.covariates[0], num_genes)


def _objective(
    unit: Family, targets: Targets, before: Mapping[str, Any], recipe: Recipe | None
) -> dict[str, Any]:
    """The objective's configuration.

    Raises:
        ConfigError: nothing is to be learnt, or the family's own objective needs labels.
    """
    if not targets.objective:
        raise ConfigError(
            "this task is zero-shot: nothing is learnt, so there is nothing to fine-tune; embed "
            "with 'cellray embed', compare with 'cellray benchmark', or train for another task"
        )
    if targets.objective != OWN:
        return merge({"name": targets.objective}, targets.settings)
    name = unit.objective
    if registry.find("cellray.objectives", name, "OBJECTIVE").supervised:
        raise ConfigError(
            f"family '{unit.name}' is trained with labels (objective '{name}') and has no "
            "self-supervised objective to go on with; score its embedding zero-shot "
            "(task.name = 'embedding')"
        )
    config = before if before.get("name") == name else {"name": name}
    return merge(merge(config, recipe.objective if recipe else {}), targets.settings)


def _moments(cells: Cells, vocab: Vocab, joinids: I64, batches: pd.Series) -> list[GeneMoments]:
    """Moments of the vocabulary's genes in each batch that is large enough, else of all cells."""
    mapping = gene_map(cells.store, vocab)
    rows = np.searchsorted(cells.joinids, joinids)
    codes, _ = pd.factorize(batches.astype("string").iloc[rows], sort=True)
    sizes = np.bincount(codes[codes >= 0])
    large = np.flatnonzero(sizes >= _LEAST_CELLS)
    groups = [joinids[codes == code] for code in large] or [joinids]
    found = []
    for group in groups:
        total = None
        for first in range(0, len(group), _BLOCK_CELLS):
            block = cells.store.read_block(group[first : first + _BLOCK_CELLS], mapping)
            here = GeneMoments.of_block(block, len(vocab))
            total = here if total is None else total + here
        assert total is not None, "a group has cells"
        found.append(total)
    return found


def _fewer_genes(
    start: Start, targets: Targets, cells: Cells, joinids: I64
) -> tuple[Start, list[str]]:
    """The model over its most variable genes; as it is where it has no more than are wanted.

    Raises:
        ConfigError: the family cannot leave out genes.
    """
    wanted, vocab = targets.num_genes, start.vocab
    if not wanted or len(vocab) <= wanted:
        return start, []
    unit = family(start.manifest.family)
    if unit.keep_genes is None:
        raise ConfigError(
            f"task.num_genes = {wanted}, but family '{unit.name}' cannot leave out some of its "
            f"{len(vocab)} genes; set task.num_genes = 0"
        )
    moments = _moments(cells, vocab, joinids, cells.obs[targets.covariates[0]])
    genes = choose_variable_by_batch(moments, num_genes=wanted)
    kept, tokens = vocab.only(genes)
    weights = start.weights
    if weights is not None:
        weights = _bare(start.manifest, vocab, weights)
        weights = unit.keep_genes(weights, tokens)
    manifest = replace(
        start.manifest, vocab_fingerprint=kept.fingerprint, classes=[], chosen_genes=True
    )
    said = (
        f"genes: {len(kept)} variable ones of the vocabulary's {len(vocab)}, chosen within "
        f"{len(moments)} batches of training cells"
    )
    return Start(manifest, kept, weights), [said]


def _bare(
    manifest: Manifest, vocab: Vocab, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under the names of its family's model, without a classifier.

    Raises:
        CheckpointError: they do not fit their own configuration.
    """
    with torch.device("meta"):
        own = model_of(replace(manifest, classes=[]), vocab)
    return fitting_weights(own, weights)


def _modules(names: Sequence[str]) -> str:
    """First parts of tensor names, with how many tensors each stands for."""
    first = [name.partition(".")[0] for name in names]
    return ", ".join(f"{name} ({first.count(name)})" for name in dict.fromkeys(first)) or "none"


def _carried(
    before: Start, manifest: Manifest, vocab: Vocab
) -> tuple[dict[str, torch.Tensor] | None, list[str]]:
    """The tensors that the new configuration takes over, and what is said of the others."""
    if before.weights is None:
        return None, []
    weights = _bare(before.manifest, vocab, before.weights)
    with torch.device("meta"):
        own = model_of(manifest, vocab).state_dict()
    kept = {n: v for n, v in weights.items() if n in own and own[n].shape == v.shape}
    drawn = [n for n in own if n not in kept]
    gone = [n for n in weights if n not in kept and n not in own]
    if not drawn and not gone:
        return kept, []
    said = f"weights: {len(kept)} of {len(own)} tensors are the checkpoint's"
    if drawn:
        said += f"; drawn anew by the seed (new, or of another shape): {_modules(drawn)}"
    if gone:
        said += f"; not taken: {_modules(gone)}"
    return kept, [said]


def lay_over(
    start: Start,
    targets: Targets,
    cells: Cells,
    train: I64,
    *,
    covariates: Mapping[str, list[str]],
    statistics_cells: int,
    seed: int,
) -> Start:
    """The start of a fine-tuning with what the task asks for laid over it.

    Args:
        start: the checkpoint, or a new model's configuration.
        targets: of the task.
        cells: the selection, with the columns of ``targets.covariates``.
        train: joinids of the training cells, from which genes are chosen.
        covariates: name -> categories, of the model that is trained.
        statistics_cells: training cells looked at for the choice of genes, at most.
        seed: draws them.

    Raises:
        ConfigError: the family has no such recipe, cannot leave out genes, or has no objective
            that needs no labels; or the task is zero-shot.
        CheckpointError: the checkpoint does not fit its own configuration.
    """
    unit = family(start.manifest.family)
    plain = not targets.recipe and not targets.model and not targets.num_genes
    if plain:
        objective = _objective(unit, targets, start.manifest.objective, None)
        return replace(start, manifest=replace(start.manifest, objective=objective))
    _recipe(unit, targets, len(start.vocab))  # refuse before cells are read
    sample = sample_cells(train, statistics_cells, seed)
    fewer, said = _fewer_genes(start, targets, cells, sample)
    recipe = _recipe(unit, targets, len(fewer.vocab))
    before = fewer.manifest
    manifest = replace(
        before,
        model=merge(merge(before.model, recipe.model if recipe else {}), targets.model),
        tokenizer=merge(before.tokenizer, recipe.tokenizer if recipe else {}),
        objective=_objective(unit, targets, before.objective, recipe),
        covariates=covariates,
        classes=list(targets.classes),
        classes_of="cell",
    )
    weights, carried = _carried(fewer, manifest, fewer.vocab)
    if recipe is not None:
        said.insert(0, f"recipe: {targets.recipe} of {unit.name} ({recipe.source})")
    return Start(manifest, fewer.vocab, weights, (*said, *carried))
