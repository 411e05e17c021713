"""Fine-tuning runs that train a part: from a checkpoint, its architecture alone, and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellray.core.errors import ConfigError
from cellray.infer.load import load
from cellray.nn.lora import has_factors
from cellray.runs import build_run, run_job
from cellray.train.checkpoint import model_of, read_checkpoint, read_weights, write_checkpoint
from cellray.train.finetune import predict_cells, predict_labels, prepare_finetune
from cellray.train.pretrain import prepare_pretrain
from cellray.train.rundir import RunDirectory
from cellray.train.saving import NOTES, committed
from helpers_cells import known_cells
from helpers_runs import finetune_run, pretrain_raw, pretrain_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def pretrained(small_store, tmp_path_factory):
    """A checkpoint of drawn weights: what a pretraining run would leave, without the training."""
    folder = tmp_path_factory.mktemp("pre")
    job = prepare_pretrain(pretrain_run(small_store, folder)).job
    torch.manual_seed(11)
    model = model_of(job.manifest, job.data.source.vocab)
    target = folder / "model"
    write_checkpoint(target, job.manifest, vocab=job.data.source.vocab, weights=model.state_dict())
    return str(target)


def body(weights):
    return {n: v for n, v in weights.items() if n.startswith("backbone.")}


def test_factors_are_kept_in_checkpoints_and_merged_in_the_model(
    pretrained, small_store, ray_cluster, tmp_path
):
    run = finetune_run(
        small_store,
        tmp_path,
        init_from=pretrained,
        adapt={"mode": "lora", "rank": 2},
        train={"steps": 12, "eval_every_steps": 12},
    )
    result = run_job(run)
    folder = RunDirectory.at(result.trained.run_dir).path / "checkpoints"
    last = folder / committed(result.trained.run_dir)[-1]["name"]
    kept = read_weights(last)
    assert has_factors(kept)
    _, _, base = read_checkpoint(pretrained)
    for name, value in body(kept).items():
        if ".lora." not in name:
            assert torch.equal(value, base[name.removeprefix("backbone.")]), name
    model = load(result.trained.model_dir)  # an ordinary one
    cells = known_cells()[:20].copy()
    assert not has_factors(read_weights(RunDirectory.at(result.trained.run_dir).model))
    np.testing.assert_allclose(
        load(str(last)).annotate(cells)["probability"],
        model.annotate(cells)["probability"],
        atol=1e-5,
    )
    counts = result.params
    factors = sum(v.numel() for n, v in kept.items() if n.endswith((".up", ".down")))
    head = sum(v.numel() for n, v in kept.items() if n.startswith("head."))
    assert counts["n_params_trainable"] == factors + head
    assert counts["n_params_total"] == sum(p.numel() for p in model.model.parameters())
    prepared = prepare_finetune(run)
    for joinids in (prepared.split.train, prepared.split.test):
        labels, confidence = predict_cells(model, prepared, joinids)
        assert labels.tolist() == predict_labels(model, prepared, joinids).tolist()
        found = model.annotate(known_cells()[joinids].copy())
        assert labels.tolist() == found["label"].tolist()
        np.testing.assert_allclose(confidence, found["probability"], atol=1e-6)
    truth = known_cells().obs["cell_type"].astype(str).to_numpy()
    labels, _ = predict_cells(model, prepared, prepared.split.train)
    assert result.train_accuracy == np.mean(labels == truth[prepared.split.train])


@pytest.mark.slow
def test_a_run_of_factors_goes_on_from_a_checkpoint_bit_for_bit(
    pretrained, small_store, ray_cluster, tmp_path
):
    run = finetune_run(
        small_store,
        tmp_path,
        init_from=pretrained,
        adapt={"mode": "lora", "rank": 2, "dropout": 0.1},
        train={"steps": 12, "eval_every_steps": 12},
        checkpoint={"every_steps": 6, "keep_last": 2},
    )
    whole = run_job(run)
    directory = RunDirectory.at(whole.trained.run_dir)
    last = directory.path / "checkpoints" / committed(directory.path)[-1]["name"]
    want = read_weights(last)
    (directory.path / "result.json").unlink()  # as if it had been killed after step 6
    notes = (directory.path / NOTES).read_text().splitlines(keepends=True)
    (directory.path / NOTES).write_text("".join(notes[:-1]))
    again = run_job(run)
    assert again.trained.resumed_from_step == 6
    last = directory.path / "checkpoints" / committed(directory.path)[-1]["name"]
    found = read_weights(last)
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name
    assert again.train_accuracy == whole.train_accuracy


@pytest.mark.slow
def test_a_probe_of_drawn_weights_is_the_control_of_a_checkpoint(
    pretrained, small_store, ray_cluster, tmp_path
):
    run = finetune_run(
        small_store,
        tmp_path,
        init_from=pretrained,
        init_weights=False,
        adapt={"mode": "probe"},
        train={"steps": 2, "eval_every_steps": 2},
    )
    result = run_job(run)
    manifest, vocab, weights = read_checkpoint(result.trained.model_dir)
    before, genes, base = read_checkpoint(pretrained)
    assert manifest.model == before.model
    assert manifest.tokenizer == before.tokenizer
    assert vocab.fingerprint == genes.fingerprint
    torch.manual_seed(run.seed)
    drawn = model_of(manifest, vocab).state_dict()
    for name, value in body(weights).items():
        assert torch.equal(value, drawn[name]), name
        if value.ndim == 2:
            assert not torch.equal(value, base[name.removeprefix("backbone.")]), name
    assert any(not torch.equal(weights[n], drawn[n]) for n in weights if n.startswith("head."))


def test_no_table_of_a_family_comes_with_drawn_weights(small_store, tmp_path):
    genes = known_cells().var_names.to_numpy().astype(str)
    np.savez(tmp_path / "table.npz", genes=genes, vectors=np.ones((60, 8), dtype=np.float32))
    sizes = {"width": 8, "num_layers": 1, "num_heads": 2, "head_width": 4, "ffn_width": 8}
    table = {"family": "scbert", **sizes, "gene2vec": str(tmp_path / "table.npz")}
    raw = pretrain_raw(small_store, tmp_path) | {"model": table, "tokenizer": {}}
    job = prepare_pretrain(build_run("pretrain", raw)).job
    assert "genes.weight" in job.weights
    model = model_of(job.manifest, job.data.source.vocab)
    folder = tmp_path / "model"
    write_checkpoint(folder, job.manifest, vocab=job.data.source.vocab, weights=model.state_dict())
    over = {"init_from": str(folder), "init_weights": False}
    assert prepare_finetune(finetune_run(small_store, tmp_path, **over)).job.weights is None
    over["init_weights"] = True
    assert prepare_finetune(finetune_run(small_store, tmp_path, **over)).job.weights is not None
    with pytest.raises(ConfigError, match="init_weights = false needs init_from"):
        finetune_run(small_store, tmp_path, model={"family": "tosica"}, init_weights=False)


def test_the_old_key_is_answered_with_the_new_one(small_store, tmp_path):
    with pytest.raises(ConfigError, match=r"'train_backbone' is gone.*adapt.mode = \"probe\""):
        finetune_run(small_store, tmp_path, init_from="x", train_backbone=False)
