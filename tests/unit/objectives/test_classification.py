"""Classification: labels in, summed cross-entropy out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from cellray.core.batch import CellBatch, ModelOutput
from cellray.core.draw import Draw
from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.objectives.base import Tallies
from cellray.objectives.classification import OBJECTIVE, ClassificationConfig

VOCAB = Vocab.from_genes(["A"], ["A"], specials=("<pad>",))


def make_batch(labels: list[int] | None) -> CellBatch:
    num = len(labels or [0])
    return CellBatch(
        cell_ids=torch.arange(num),
        token_ids=torch.ones(num, 2, dtype=torch.long),
        values=torch.zeros(num, 2),
        attention_mask=torch.ones(num, 2, dtype=torch.bool),
        covariates={} if labels is None else {"label": torch.tensor(labels)},
    )


def output(**predictions: torch.Tensor) -> ModelOutput:
    zero = torch.zeros(1, 1, 1)
    return ModelOutput(hidden=zero, cell=zero[0], predictions=predictions)


def test_unlabelled_cells_are_not_counted():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    batch = objective.corrupt(make_batch([2, -1, 0, 1]), Draw(0))
    assert batch.target_mask.tolist() == [True, False, True, True]
    assert batch.num_targets == 3
    logits = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    loss = objective.loss(output(class_logits=logits.bfloat16()), batch)
    want = torch.nn.functional.cross_entropy(
        logits[[0, 2, 3]], torch.tensor([2, 0, 1]), reduction="sum"
    )
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(want.item())
    assert loss.num_targets == 3
    assert loss.parts["accuracy"].item() == 2.0


def test_tallies_of_batches_add_up_to_the_macro_f1_of_all_cells():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    rng = np.random.default_rng(0)
    truth, logits = rng.integers(-1, 4, size=90), torch.from_numpy(rng.normal(size=(90, 6)))
    logits[:, 5] -= 9.0  # a class of neither truth nor prediction
    tally = torch.zeros(6, 6, dtype=torch.float64)
    for start in range(0, 90, 30):
        batch = objective.corrupt(make_batch(truth[start : start + 30].tolist()), Draw(0))
        tally += objective.tally(output(class_logits=logits[start : start + 30]), batch)
    known = truth >= 0
    guess = logits.argmax(-1).numpy()[known]
    want = f1_score(truth[known], guess, average="macro", zero_division=0)
    assert objective.judged(tally)["macro_f1"] == pytest.approx(want, abs=1e-12)
    assert tally.sum() == known.sum()
    assert objective.judged(torch.zeros(6, 6, dtype=torch.float64)) == {"macro_f1": 0.0}
    assert isinstance(objective, Tallies)


def test_tokens_are_left_as_they_are():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    batch = make_batch([0, 1])
    out = objective.corrupt(batch, Draw(0))
    assert out.token_ids is batch.token_ids
    assert out.values is batch.values
    assert out.unknown_mask is None


def test_a_batch_without_any_label_gives_zero():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    batch = objective.corrupt(make_batch([-1, -1]), Draw(0))
    loss = objective.loss(output(class_logits=torch.zeros(2, 3, requires_grad=True)), batch)
    loss.total.backward()
    assert (loss.num_targets, loss.total.item()) == (0, 0.0)


def test_a_batch_without_the_label_covariate_is_refused():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    with pytest.raises(DataError, match=r"needs the covariate 'label'; the batch carries none"):
        objective.corrupt(make_batch(None), Draw(0))
    other = replace(make_batch(None), covariates={"donor": torch.zeros(1, dtype=torch.long)})
    with pytest.raises(DataError, match=r"the batch carries \['donor'\]"):
        objective.corrupt(other, Draw(0))


def test_a_model_without_a_classifier_is_refused():
    objective = OBJECTIVE.build(ClassificationConfig(), VOCAB)
    batch = objective.corrupt(make_batch([0]), Draw(0))
    with pytest.raises(DataError, match="reads the prediction 'class_logits'"):
        objective.loss(output(), batch)
