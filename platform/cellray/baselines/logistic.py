"""L2 logistic regression on variable genes, its strength chosen on training cells alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from cellray.baselines._features import FeatureConfig, GeneFeatures, fit_genes, one_thread
from cellray.baselines.base import BaselineUnit, Labelled, check_training
from cellray.metrics.classification import score_annotation

__all__ = ["BASELINE", "LogisticConfig", "inner_folds", "trials_of"]

I64 = npt.NDArray[np.int64]


class LogisticConfig(FeatureConfig):
    """Keys of the regression.

    Attributes:
        strengths: values of C (inverse L2 penalty, summed loss), above 0, to choose from.
        folds: inner folds the choice is made on; fewer than 2 takes the first strength unchecked.
        max_iterations: of the solver, per fit.
    """

    name: str = "logistic"
    strengths: list[Annotated[float, Field(gt=0)]] = Field(
        default=[0.01, 0.1, 1.0, 10.0], min_length=1
    )
    folds: int = Field(default=3, ge=0)
    max_iterations: int = Field(default=200, ge=1)


@dataclass(frozen=True)
class _Logistic:
    genes: GeneFeatures
    model: Any
    strength: float

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        scaled = self.genes.scaled(counts)
        if counts.shape[0] == 0:
            return Labelled(np.zeros(0, dtype=np.int64), np.zeros(0))
        probability = np.asarray(self.model.predict_proba(scaled), dtype=np.float64)
        codes = np.asarray(self.model.predict(scaled), dtype=np.int64)
        return Labelled(codes, probability.max(axis=1))

    def predict(self, counts: sparse.csr_matrix) -> I64:
        return self.answer(counts).codes

    def embed(self, counts: sparse.csr_matrix) -> None:
        return None


@dataclass(frozen=True)
class _OneClass:
    """What is left of a regression when the training cells have one class only."""

    genes: GeneFeatures
    label: int

    def answer(self, counts: sparse.csr_matrix) -> Labelled:
        num = self.genes.apply(counts).shape[0]
        return Labelled(np.full(num, self.label, dtype=np.int64), np.ones(num))

    def predict(self, counts: sparse.csr_matrix) -> I64:
        return self.answer(counts).codes

    def embed(self, counts: sparse.csr_matrix) -> None:
        return None


def inner_folds(labels: I64, *, folds: int, seed: int) -> I64:
    """Deal training cells to folds class by class, so that every fold holds a like share of each.

    Args:
        labels: (N,) class codes.
        folds: number of folds.
        seed: what the order within a class is drawn from.

    Returns:
        (N,) int64 fold of each cell; a class of fewer cells than folds misses some of them.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    result = np.empty(len(labels), dtype=np.int64)
    result[by_class] = np.arange(len(labels)) % folds
    return result


def _path(
    scaled: sparse.csr_matrix, labels: I64, strengths: Sequence[float], iterations: int
) -> Iterator[LogisticRegression]:
    """Fits at rising C, each started from the last; one thread, so sums keep their order."""
    model = LogisticRegression(max_iter=iterations, warm_start=True)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said once, by the final fit
        for strength in strengths:
            yield model.set_params(C=strength).fit(scaled, labels)


def trials_of(config: LogisticConfig) -> int:
    """Strengths that the inner folds compare; 1 if there is no choice to make."""
    return 1 if config.folds < 2 else len(config.strengths)


def _choose(config: LogisticConfig, counts: sparse.csr_matrix, labels: I64, seed: int) -> float:
    """The strength with the best macro-F1 over out-of-fold training cells, pooled.

    Genes are chosen anew within each fold. A tie goes to the stronger penalty.
    """
    strengths = sorted(config.strengths)
    if config.folds < 2 or len(strengths) == 1 or len(labels) < config.folds:
        return config.strengths[0]
    fold = inner_folds(labels, folds=config.folds, seed=seed)
    guesses = np.full((len(strengths), len(labels)), -1, dtype=np.int64)
    for held_out in range(config.folds):
        inside, outside = np.flatnonzero(fold != held_out), np.flatnonzero(fold == held_out)
        genes = fit_genes(counts[inside], config)
        scaled, scaled_out = genes.scaled(counts[inside]), genes.scaled(counts[outside])
        if len(np.unique(labels[inside])) == 1:
            guesses[:, outside] = labels[inside][0]
            continue
        path = _path(scaled, labels[inside], strengths, config.max_iterations)
        for row, model in enumerate(path):
            guesses[row, outside] = model.predict(scaled_out)
    classes = [str(c) for c in np.unique(labels)]
    truth = labels.astype(str)
    scores = [
        score_annotation(truth, guess.astype(str), train_classes=classes)["macro_f1.test.v1"]
        for guess in guesses
    ]
    return strengths[int(np.argmax(scores))]


def _fit(
    config: LogisticConfig, counts: sparse.csr_matrix, labels: I64, seed: int
) -> _Logistic | _OneClass:
    check_training(counts, labels)
    genes = fit_genes(counts, config)
    if len(np.unique(labels)) == 1:
        return _OneClass(genes, int(labels[0]))
    strength = _choose(config, counts, labels, seed)
    path = [c for c in sorted(config.strengths) if c <= strength]
    *_, model = _path(genes.scaled(counts), labels, path, config.max_iterations)
    if int(model.n_iter_.max()) >= config.max_iterations:
        warnings.warn(
            f"baseline logistic: the solver stopped after max_iterations = "
            f"{config.max_iterations}, before it converged; raise it",
            stacklevel=2,
        )
    return _Logistic(genes, model, strength)


BASELINE = BaselineUnit(
    name="logistic",
    config=LogisticConfig,
    fit=_fit,
    seed_scope="inner_folds",
    title="L2 logistic regression on 2,000 variable genes, C by inner cross-validation",
    trials=trials_of,
)
