"""Selections and genes at the edge: none, one, all; unknown to the vocabulary or to the store."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from cellray.core import registry
from cellray.core.errors import ConfigError, DataError
from cellray.core.section import build_section
from cellray.data.config import DataSection
from cellray.data.ingest import IngestConfig, ingest
from cellray.data.pipeline import token_stream
from cellray.data.vocab import Vocab
from cellray.models.base import BuildContext, build_model, family
from cellray.testing import assert_same_cells
from cellray.train.microbatch import Collator
from helpers_source import source_and_plan

GENES = [f"ENSG{i:011d}" for i in range(30)]
KNOWN = 20  # the first genes are in the vocabulary; so are five that the store lacks
SMALL = {"width": 16, "num_layers": 2, "num_heads": 4, "ffn_width": 24}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """48 cells; those of donor "far" have counts in genes 20..29 only."""
    folder = tmp_path_factory.mktemp("odd")
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.5, (48, 30)).astype(np.float32)
    counts[:, KNOWN:] += 1
    donors = np.array(["near", "far"])[np.arange(48) % 2]
    counts[donors == "far", :KNOWN] = 0
    obs = pd.DataFrame({"donor": donors}, index=[f"c{i}" for i in range(48)])
    adata = ad.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))
    adata.write_h5ad(folder / "odd.h5ad")
    ingest(IngestConfig(files=[str(folder / "odd.h5ad")], uri=str(folder / "store")))
    return str(folder / "store"), counts


def vocab_of(tokenizer="bins"):
    unit = registry.find("cellray.tokenizers", tokenizer, "TOKENIZER")
    ids = [f"ENSG9999999999{i}" for i in range(5)] + GENES[:KNOWN]
    vocab = Vocab.from_genes(ids, ids, specials=unit.specials)
    if unit.needs_medians:
        vocab = vocab.with_medians(np.ones(len(ids), np.float32))
    return vocab


def test_a_filter_that_selects_nothing_says_so(store):
    with pytest.raises(DataError, match=r"obs_filter = 'donor == 'x'' .* selects none of the 48"):
        source_and_plan(DataSection(uri=store[0], obs_filter="donor == 'x'"))


def test_one_cell_is_a_selection(store):
    data = DataSection(uri=store[0], obs_filter="obs_id == 'c17'")
    source, plan = source_and_plan(data, cells_global=1)
    assert plan.rows(3, 0, 1, rank=0, world=1).tolist() == [[17]]
    assert source.tokens(np.array([17]), epoch=0).joinids.tolist() == [17]
    with pytest.raises(ConfigError, match="has 1 cells, fewer than one global batch of 12; lower"):
        source_and_plan(data)


def test_a_filter_that_selects_all_is_no_filter(store):
    every, _ = source_and_plan(DataSection(uri=store[0], obs_filter="nnz >= 0"))
    plain, _ = source_and_plan(DataSection(uri=store[0]))
    assert every.joinids.tolist() == plain.joinids.tolist() == list(range(48))


def test_genes_that_only_one_side_knows_are_left_out_on_the_other(store):
    uri, counts = store
    vocab = vocab_of()
    source, _ = source_and_plan(DataSection(uri=uri), vocab=vocab)
    assert source.gene_map.tolist() == [*range(5, 25), *[-1] * 10]
    block = source.store.read_block(np.arange(48), source.gene_map)
    assert block.counts.sum() == counts[:, :KNOWN].sum()
    assert block.library_sizes.tolist() == counts.sum(axis=1).tolist()
    assert min(block.genes) >= 5


@pytest.mark.ray
@pytest.mark.parametrize("name", ["scgpt", "geneformer"])
def test_cells_without_a_known_gene_go_through_a_training_step(store, ray_cluster, name):
    unit = family(name)
    vocab = vocab_of(unit.tokenizer)
    source, plan = source_and_plan(DataSection(uri=store[0]), vocab=vocab, tokenizer=unit.tokenizer)
    objective = registry.find("cellray.objectives", unit.objective, "OBJECTIVE")
    hide = objective.build(build_section(objective.config, {"name": unit.objective}), vocab)
    collator = Collator(hide, pad=vocab.pad, cells_micro=6, seed=3)
    torch.manual_seed(0)
    known = {k: v for k, v in SMALL.items() if k in unit.config.model_fields}
    config = build_section(unit.config, {"family": name, **known})
    model = build_model(name, config, BuildContext(vocab, max_tokens=30))
    seen, targets = [], 0
    for step in token_stream(source, plan, first_step=0, last_step=plan.batches_per_epoch):
        seen.append(step.block.joinids)
        for batch in collator(step.block, {}, epoch=step.epoch, step=step.step):
            loss = hide.loss(model(batch), batch)
            assert torch.isfinite(loss.total)
            loss.total.backward()
            targets += loss.num_targets
    assert_same_cells(seen, np.arange(48))
    assert targets > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_batch_of_only_such_cells_has_a_loss_of_zero(store):
    unit = family("scgpt")
    vocab = vocab_of(unit.tokenizer)
    data = DataSection(uri=store[0], obs_filter="donor == 'far'")
    source, plan = source_and_plan(data, vocab=vocab)
    block = source.tokens(plan.rows(0, 0, 1, rank=0, world=1).reshape(-1), epoch=0)
    objective = registry.find("cellray.objectives", unit.objective, "OBJECTIVE")
    hide = objective.build(build_section(objective.config, {"name": unit.objective}), vocab)
    model = build_model(
        "scgpt",
        build_section(unit.config, {"family": "scgpt", **SMALL}),
        BuildContext(vocab, max_tokens=30),
    )
    for batch in Collator(hide, pad=vocab.pad, cells_micro=12, seed=0)(block, {}, epoch=0):
        loss = hide.loss(model(batch), batch)
        assert (loss.num_targets, loss.total.item()) == (0, 0.0)
