"""Checkpoints: whole or refused, with the reason."""

import json

import pytest
import torch

from cellray.core.errors import CheckpointError
from cellray.data.vocab import Vocab
from cellray.train.checkpoint import (
    Manifest,
    export_model,
    read_checkpoint,
    read_manifest,
    write_checkpoint,
)

VOCAB = Vocab.from_genes(["ENSG00000000001", "ENSG00000000002"], ["A", "B"], specials=("<pad>",))


def manifest(**over):
    facts = {
        "family": "scgpt",
        "model": {"family": "scgpt"},
        "tokenizer": {"name": "bins"},
        "objective": {"name": "generative"},
        "vocab_fingerprint": VOCAB.fingerprint,
        "data_fingerprint": "d",
    }
    return Manifest(**{**facts, **over})


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "checkpoint"
    weights = {"w": torch.arange(4.0), "n": torch.tensor(3)}
    at = manifest().at(7, {"epoch": 1, "position": 2}, 4, {"train/loss": 0.5})
    write_checkpoint(folder, at, vocab=VOCAB, weights=weights)
    (folder / "engine").mkdir()
    (folder / "engine" / "shard").write_text("x")
    return folder


def test_round_trip_and_export(saved, tmp_path):
    export_model(saved, tmp_path / "model")
    read, vocab, weights = read_checkpoint(tmp_path / "model")
    assert (read.step, read.workers, read.cursor) == (7, 4, {"epoch": 1, "position": 2})
    assert vocab.fingerprint == VOCAB.fingerprint
    assert torch.equal(weights["w"], torch.arange(4.0))
    assert not (tmp_path / "model" / "engine").exists()
    export_model(saved, tmp_path / "model")  # replaces what is there
    assert read_manifest(tmp_path / "model").step == 7


def test_a_missing_checkpoint_names_the_nearest(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*Did you mean 'checkpoint'"):
        read_manifest(saved.parent / "chekpoint")


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"has no manifest.json \(it holds a.txt\)"):
        read_manifest(tmp_path / "other")


def test_torn_weights(saved):
    file = saved / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is torn"):
        read_checkpoint(saved)


def test_a_manifest_of_another_format(saved):
    raw = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps(raw | {"format": "other.v9"}))
    with pytest.raises(CheckpointError, match="has format 'other.v9'"):
        read_manifest(saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_manifest(saved)


def test_a_vocabulary_swapped_after_training_is_refused(saved):
    other = Vocab.from_genes(["ENSG00000000009"], [""], specials=("<pad>",))
    other.save(saved / "vocab.json.gz")
    with pytest.raises(CheckpointError, match=r"vocabulary \(1 genes, .*other than the one it was"):
        read_checkpoint(saved)
