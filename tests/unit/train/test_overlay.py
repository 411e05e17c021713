"""A recipe laid over a checkpoint: what is kept, drawn, left out, learnt from, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cellray.core.draw import Draw
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.core.section import merge
from cellray.data.collate import collate_tokens
from cellray.infer.embed import embed_cells, token_source
from cellray.infer.load import LoadedModel, load
from cellray.models.base import family
from cellray.runs import build_run
from cellray.train.checkpoint import model_of, write_checkpoint
from cellray.train.finetune import Finetuning, prepare_finetune
from cellray.train.job import build_objective, load_backbone
from cellray.train.score_embedding import score_embedding, unintegrated

SIZES = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16, "dropout": 0.0}
SMALL = {"family": "scgpt", **SIZES}
PARTS = {"gep", "gepc", "expressed", "expressed_from_cell", "ecs", "dar"}


def raw_run(uri: str, folder: Path, **over: object) -> dict:
    raw = {
        "name": "fine",
        "data": {"uri": uri},
        "task": {"name": "integration", "batch": "donor", "num_genes": 20, "umap": False},
        "batch": {"cells_global": 24, "cells_micro": 24},
        "train": {"steps": 2},
        "engine": {"name": "torch"},
        "checkpoint": {"dir": str(folder)},
    }
    return merge(raw, over)


def prepared_of(uri: str, folder: Path, **over: object) -> Finetuning:
    return prepare_finetune(build_run("finetune", raw_run(uri, folder, **over)))


def write(folder: Path, prepared: Finetuning) -> str:
    """A checkpoint with random weights of the model that a run would train."""
    vocab, manifest = prepared.job.data.source.vocab, prepared.job.manifest
    torch.manual_seed(5)
    weights = model_of(manifest, vocab).state_dict()
    manifest = replace(manifest, vocab_fingerprint=vocab.fingerprint)
    write_checkpoint(folder, manifest, vocab=vocab, weights=weights)
    return str(folder)


@pytest.fixture(scope="module")
def pretrained(small_store: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain scGPT over all 60 genes, with no batch in it."""
    folder = tmp_path_factory.mktemp("plain")
    plain = {"recipe": "objective"}
    return write(folder / "model", prepared_of(small_store, folder, model=SMALL, task=plain))


@pytest.fixture(scope="module")
def integration(pretrained: str, small_store: str, tmp_path_factory) -> Finetuning:
    return prepared_of(small_store, tmp_path_factory.mktemp("run"), init_from=pretrained)


def trained(prepared: Finetuning) -> LoadedModel:
    """The model a worker would begin with, as if it had been trained."""
    vocab, manifest = prepared.job.data.source.vocab, prepared.job.manifest
    torch.manual_seed(0)
    model = model_of(manifest, vocab)
    load_backbone(model, prepared.job.weights)
    return LoadedModel(model.eval(), vocab, manifest, "here")


def test_the_recipe_is_in_the_configuration(integration: Finetuning) -> None:
    manifest = integration.job.manifest
    assert manifest.model["domain_norm"] == "domain"
    assert manifest.model["batch_key"] == "donor"
    assert manifest.model["width"] == 16
    assert manifest.tokenizer["include_zeros"]
    assert manifest.tokenizer["max_tokens"] == 21
    assert manifest.objective["name"] == "generative"
    assert (manifest.objective["ecs_weight"], manifest.objective["dar_weight"]) == (10.0, 1.0)
    assert manifest.objective["mask_ratios"] == [0.4]
    assert manifest.covariates == {"donor": ["d0", "d1", "d2", "d3"]}
    assert manifest.classes == []


def test_weights_that_fit_are_kept_and_the_others_are_named(
    integration: Finetuning, pretrained: str
) -> None:
    old = load(pretrained)
    weights = integration.job.weights
    assert weights is not None
    kept = integration.job.data.source.vocab
    rows = [old.vocab.gene_ids.index(gene) for gene in kept.gene_ids]
    tokens = [*range(len(old.vocab.specials)), *old.vocab.gene_tokens[rows]]
    table = old.model.state_dict()["genes.table.weight"]
    torch.testing.assert_close(weights["genes.table.weight"], table[tokens], rtol=0, atol=0)
    same = [name for name in weights if name.startswith("encoder.")]
    assert len(same) == 12
    for name in same:
        assert torch.equal(weights[name], old.model.state_dict()[name]), name
    assert not [n for n in weights if n.startswith(("adversary", "domain_norm", "flag"))]
    assert "expression_from_cell.weight" not in weights
    recipe, genes, carried = integration.said
    assert recipe.startswith("recipe: integration of scgpt (doi:10.1038/s41592-024-02201-0")
    assert genes == (
        "genes: 20 variable ones of the vocabulary's 60, chosen within 4 batches of training cells"
    )
    for text in ("drawn anew by the seed", "adversary (10)", "batch_labels (3)", "flag (1)"):
        assert text in carried


def test_all_parts_of_the_recipe_are_in_the_loss_and_reach_the_encoder(
    integration: Finetuning,
) -> None:
    model = trained(integration).model.train()
    source, vocab = integration.job.data.source, integration.job.data.source.vocab
    ids = integration.split.train[:24]
    tokens = source.tokens(ids, epoch=0)
    np.testing.assert_array_equal(np.diff(tokens.indptr), 21)  # zeros are tokens
    batch = collate_tokens(tokens, pad=vocab.pad, covariates=source.covariates(ids))
    assert (batch.covariates["label"] == -1).all()
    objective = build_objective(integration.job.manifest.objective, vocab)
    batch = objective.corrupt(batch, Draw(0))
    loss = objective.loss(model(batch), batch)
    assert {name for name, part in loss.parts.items() if float(part) > 0} == PARTS
    loss.total.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_the_adversary_pushes_the_encoder_away_from_batches(integration: Finetuning) -> None:
    """The gradient of DAR that reaches the encoder is that of the cross-entropy, reversed."""
    model = trained(integration).model
    source, vocab = integration.job.data.source, integration.job.data.source.vocab
    ids = integration.split.train[:24]
    batch = collate_tokens(
        source.tokens(ids, epoch=0), pad=vocab.pad, covariates=source.covariates(ids)
    )
    batch = build_objective(integration.job.manifest.objective, vocab).corrupt(batch, Draw(0))
    output = model(batch)
    codes = output.predictions["batch_codes"]
    assert torch.equal(codes, batch.covariates["donor"])
    reversed_loss = torch.nn.functional.cross_entropy(output.predictions["batch_logits"], codes)
    plain_loss = torch.nn.functional.cross_entropy(model.adversary.classifier(output.cell), codes)
    weight = model.encoder.blocks[0].attention.qkv.weight
    there = torch.autograd.grad(reversed_loss, weight, retain_graph=True)[0]
    plain = torch.autograd.grad(plain_loss, weight, retain_graph=True)[0]
    assert plain.abs().max() > 0
    torch.testing.assert_close(there, -plain)
    last = next(reversed(list(model.adversary.parameters())))
    mine = torch.autograd.grad(reversed_loss, last, retain_graph=True)[0]
    torch.testing.assert_close(mine, torch.autograd.grad(plain_loss, last)[0])


def test_cells_are_embedded_with_the_statistics_of_their_own_batch(
    integration: Finetuning,
) -> None:
    model = trained(integration)
    with torch.no_grad():
        for number, norm in enumerate(model.backbone.domain_norm.norms):
            norm.running_mean.fill_(0.3 * number)
    ids = integration.cells.joinids
    source = replace(integration.job.data.source, tokenizer=model.manifest.tokenizer)
    here = embed_cells(model, source, ids, cells_micro=7)
    donors = source.codes["donor"]
    assert set(donors) == {0, 1, 2, 3}
    for code in range(4):
        alone = replace(source, codes={"donor": np.full_like(donors, code)})
        of_code = embed_cells(model, alone, ids)
        mine = donors == code
        np.testing.assert_allclose(here[mine], of_code[mine], atol=1e-5)
        assert np.abs(here[~mine] - of_code[~mine]).max() > 1e-3


def test_an_unseen_batch_is_refused_when_cells_are_embedded(integration: Finetuning) -> None:
    model = trained(integration)
    obs = integration.cells.obs.copy()
    obs["donor"] = obs["donor"].astype(str).replace("d3", "d9")
    cells = replace(integration.cells, obs=obs)
    with pytest.raises(DataError, match="'donor' has values the model was not trained with: d9"):
        token_source(model, cells)


def test_the_embedding_is_scored_beside_its_principal_components(
    integration: Finetuning, tmp_path: Path
) -> None:
    scores, pictures = score_embedding(trained(integration), integration, tmp_path)
    assert pictures == ()
    assert scores["n_scored_cells"] == 240
    assert "total_60_40.bio5_batch5.v1" in scores or "pcr_comparison.v1" not in scores
    before = unintegrated(integration.cells, integration.cells.joinids)
    assert before.shape == (240, 50)
    np.testing.assert_allclose(before.mean(axis=0), 0, atol=1e-3)
    spread = before.std(axis=0)
    assert (np.diff(spread) <= 1e-6).all()


def test_keys_of_the_task_lie_over_the_recipe(
    pretrained: str, small_store: str, tmp_path: Path
) -> None:
    over = {"task": {"model": {"domain_norm": "none"}, "objective": {"dar_weight": 0.0}}}
    prepared = prepared_of(small_store, tmp_path, init_from=pretrained, **over)
    assert prepared.job.manifest.model["domain_norm"] == "none"
    assert prepared.job.manifest.objective["dar_weight"] == 0.0
    assert prepared.job.manifest.objective["ecs_weight"] == 10.0
    wrong = {"task": {"objective": {"dar_wait": 0.0}}}
    with pytest.raises(ConfigError, match=r"unknown key 'dar_wait'. Did you mean 'dar_weight'"):
        prepared_of(small_store, tmp_path, init_from=pretrained, **wrong)


def test_a_fine_tuned_model_goes_on_with_all_its_weights(
    integration: Finetuning, small_store: str, tmp_path: Path
) -> None:
    again = write(tmp_path / "model", integration)
    prepared = prepared_of(small_store, tmp_path, init_from=again)
    assert len(prepared.said) == 1  # nothing drawn, nothing left out, no gene dropped
    assert set(prepared.job.weights) == set(load(again).model.state_dict())


def test_from_scratch_the_same_recipe_is_taken(small_store: str, tmp_path: Path) -> None:
    prepared = prepared_of(small_store, tmp_path, model=SMALL)
    assert prepared.job.weights is None
    assert prepared.job.manifest.model["adversary"]
    assert len(prepared.job.data.source.vocab) == 20


def test_its_own_objective_alone_changes_nothing(pretrained: str, small_store, tmp_path) -> None:
    plain = {"task": {"recipe": "objective"}}
    prepared = prepared_of(small_store, tmp_path, init_from=pretrained, **plain)
    before = load(pretrained).manifest
    for key in ("model", "tokenizer", "objective", "covariates"):
        assert getattr(prepared.job.manifest, key) == getattr(before, key), key
    assert prepared.said == ()
    assert len(prepared.job.data.source.vocab) == 60


def test_a_classifier_is_no_hindrance(small_store: str, tmp_path: Path) -> None:
    split = {"column": "donor", "test_values": ["d3"]}
    raw = raw_run(small_store, tmp_path, model=SMALL)
    raw["task"] = {"name": "annotation", "split": split}
    annotated = write(tmp_path / "model", prepare_finetune(build_run("finetune", raw)))
    assert load(annotated).manifest.classes
    prepared = prepared_of(small_store, tmp_path, init_from=annotated)
    assert prepared.job.manifest.classes == []
    assert "encoder.blocks.0.attention.qkv.weight" in prepared.job.weights


def test_refusals(pretrained: str, small_store: str, tmp_path: Path) -> None:
    other = {"model": {"family": "geneformer", **SIZES}}
    with pytest.raises(
        ConfigError,
        match=r"family 'geneformer' has no recipe for 'integration' \(families that have one: "
        r"scgpt\); score its zero-shot embedding .* or set task.recipe = 'objective'",
    ):
        prepared_of(small_store, tmp_path, **other)
    labelled = {"model": {"family": "tosica", "gene_sets": ""}, "task": {"recipe": "objective"}}
    with pytest.raises(ConfigError, match="family 'tosica' is trained with labels"):
        prepared_of(small_store, tmp_path, **labelled)
    with pytest.raises(ConfigError, match="task 'integration' trains no classifier"):
        prepared_of(small_store, tmp_path, init_from=pretrained, register_as="mixed")
    raw = raw_run(small_store, tmp_path, init_from=pretrained)
    raw["task"] = {"name": "embedding"}
    with pytest.raises(ConfigError, match="this task is zero-shot: nothing is learnt"):
        prepare_finetune(build_run("finetune", raw))


def test_a_family_that_cannot_leave_out_genes_says_so(
    pretrained: str, small_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = replace(family("scgpt"), keep_genes=None)
    monkeypatch.setattr("cellray.train.overlay.family", lambda name: unit)
    with pytest.raises(ConfigError, match="task.num_genes = 20, but family 'scgpt' cannot leave"):
        prepared_of(small_store, tmp_path, init_from=pretrained)


def test_a_checkpoint_that_does_not_fit_itself_is_refused(
    pretrained: str, small_store: str, tmp_path: Path
) -> None:
    found = load(pretrained)
    weights = found.model.state_dict()
    weights["encoder.blocks.0.attention.qkv.weight"] = torch.zeros(3, 3)
    write_checkpoint(tmp_path / "torn", found.manifest, vocab=found.vocab, weights=weights)
    with pytest.raises(CheckpointError, match="does not fit the model: 1 tensors differ"):
        prepared_of(small_store, tmp_path, init_from=str(tmp_path / "torn"))
