"""What a fine-tuning run freezes, because its loss does not reach it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cellray.core.draw import Draw
from cellray.core.section import build_section
from cellray.data.tokens import make_tokenizer, tokenizer_unit
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.testing import random_block
from cellray.train.adapt import adapt_model
from cellray.train.config import AdaptSection
from cellray.train.job import build_objective
from cellray.train.worker import probe_cells

GENES, BATCHES = 50, 5


@pytest.fixture
def run():
    """An scGPT classifier with a norm a technical batch, whose first cells are of one batch."""
    unit = family("scgpt")
    ids = [f"ENSG{i:011d}" for i in range(GENES)]
    vocab = Vocab.from_genes(ids, [""] * GENES, specials=tokenizer_unit(unit.tokenizer).specials)
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 32}
    norms = {"domain_norm": "domain", "domain_affine": True, "batch_key": "batch"}
    config = build_section(unit.config, {"family": "scgpt", **sizes, **norms})
    context = BuildContext(vocab, covariates={"batch": BATCHES}, max_tokens=24)
    torch.manual_seed(0)
    model = build_model("scgpt", config, context, num_classes=3)
    block = random_block(8, num_genes=GENES, genes_per_cell=20, seed=1)
    tokens = make_tokenizer({"name": unit.tokenizer, "max_tokens": 24}, vocab)(block, Draw(5))
    first = {"batch": np.zeros(3, dtype=np.int64), "label": np.arange(3)}
    source = SimpleNamespace(
        tokens=lambda ids, epoch: tokens.take(np.asarray(ids)), covariates=lambda ids: first
    )
    job = SimpleNamespace(
        data=SimpleNamespace(source=source, plan=SimpleNamespace(joinids=np.arange(8))),
        manifest=SimpleNamespace(covariates={"batch": [f"b{i}" for i in range(BATCHES)]}),
        batch=SimpleNamespace(cells_micro=3),
    )
    return model, job, vocab


def test_weights_of_every_batch_train_and_the_probe_leaves_nothing_behind(run):
    model, job, vocab = run
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = build_objective({"name": "classification"}, vocab)
    probe = objective.corrupt(probe_cells(job, vocab.pad), Draw(0))
    assert set(probe.covariates["batch"].tolist()) == set(range(BATCHES))
    frozen = adapt_model(model, AdaptSection(), objective, probe, seed=0).unreached
    assert frozen
    assert {n.split(".")[1] for n in frozen} == {"flag", "expression", "expression_from_cell"}
    norms = [p for n, p in model.named_parameters() if "domain_norm.norms" in n]
    assert len(norms) == 2 * BATCHES
    assert all(p.requires_grad for p in norms)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())
