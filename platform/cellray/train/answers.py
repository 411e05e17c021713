"""What a fine-tuned model answers on the test cells: files, pictures, and where it refuses.

Legend: N cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from cellray.core.errors import DataError
from cellray.infer.load import LoadedModel
from cellray.metrics.refusal import choose_threshold, coverage_curve, score_refusal
from cellray.tasks._refusal import RefuseSection
from cellray.train.checkpoint import write_manifest

__all__ = ["ANSWERS_DIR", "Answers", "refuse_section", "with_threshold", "write_answers"]

ANSWERS_DIR = "test"  # of the run directory
_MOST_CLASSES = 60  # a larger confusion matrix cannot be read as a picture

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answers:
    """Predictions of cells whose truth is known.

    Attributes:
        cells: (N,) ids, as the store names the cells.
        truth: (N,) labels.
        predicted: (N,) best classes, nothing refused.
        confidence: (N,) their probabilities.
    """

    cells: npt.NDArray[Any]
    truth: npt.NDArray[Any]
    predicted: npt.NDArray[Any]
    confidence: npt.NDArray[np.float32]

    def scores(self, train_classes: Sequence[str], *, threshold: float) -> dict[str, float]:
        """The metrics of refusal, see :func:`cellray.metrics.refusal.score_refusal`."""
        return score_refusal(
            self.truth,
            self.predicted,
            self.confidence,
            train_classes=train_classes,
            threshold=threshold,
        )


def refuse_section(task_config: Any) -> RefuseSection:
    """The ``[task.refuse]`` table of a task that has one, else an empty one."""
    found = getattr(task_config, "refuse", None)
    return found if isinstance(found, RefuseSection) else RefuseSection()


def with_threshold(
    model: LoadedModel,
    refuse: RefuseSection,
    validation: Callable[[], tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]],
    say: Say,
) -> LoadedModel:
    """The model with the threshold that ``refuse`` asks for, in its manifest on the disk, too.

    Args:
        model: an exported one; if nothing is asked for, its family's own cutoff stays.
        refuse: the section.
        validation: gives confidences of the validation cells and whether each is right; called if
            the threshold is to be chosen by them. Test cells have no say.
        say: is told of a target that no threshold reaches: then the family's own cutoff stays.
    """
    wanted = refuse.wanted
    cutoff: float | None = None
    if "below" in wanted:
        cutoff = wanted["below"]
    elif wanted:
        confidence, correct = validation()
        try:
            cutoff = choose_threshold(confidence, correct, **wanted)
        except DataError as error:
            say(f"warning: task.refuse: {error}")
    if cutoff == model.manifest.refuse_below:
        return model
    manifest = replace(model.manifest, refuse_below=cutoff)
    write_manifest(Path(model.path), manifest)
    return replace(model, manifest=manifest)


def write_answers(
    folder: Path, answers: Answers, *, threshold: float, title: str, say: Say
) -> list[Path]:
    """Write ``predictions.csv``, ``confusion.png`` and ``coverage.png``; each appears whole.

    Args:
        folder: is made.
        answers: of the test cells.
        threshold: cells below it are marked as refused.
        title: of the pictures.
        say: is told if the confusion matrix is too large to draw.

    Returns:
        The files.
    """
    from cellray.bench.report import plot_confusion
    from cellray.infer.pictures import plot_coverage

    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        {
            "cell": answers.cells,
            "truth": answers.truth,
            "predicted": answers.predicted,
            "confidence": answers.confidence,
            "refused": answers.confidence < threshold,
        }
    )
    partial = folder / "predictions.partial"
    table.to_csv(partial, index=False)
    os.replace(partial, folder / "predictions.csv")
    written = [folder / "predictions.csv"]
    classes = set(answers.truth) | set(answers.predicted)
    if len(classes) <= _MOST_CLASSES:
        written.append(
            plot_confusion(
                answers.truth, answers.predicted, path=folder / "confusion.png", title=title
            )
        )
    else:
        say(f"no picture of the confusion matrix: {len(classes)} classes cannot be read")
    curve = coverage_curve(answers.truth, answers.predicted, answers.confidence)
    picture = folder / "coverage.png"
    written.append(plot_coverage(curve, path=picture, title=title, threshold=threshold))
    return written
