"""Checkpoints of a run: committed together, verified, the newest whole one chosen."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from cellray.core.errors import CheckpointError, StoppedError
from cellray.data.vocab import Vocab
from cellray.train.cell_log import CellLog, read_cell_log
from cellray.train.checkpoint import Manifest, read_checkpoint, verify
from cellray.train.engine import Snapshot
from cellray.train.rundir import drop_after
from cellray.train.saving import (
    NOTES,
    Saver,
    committed,
    judged_loss,
    newest_whole,
    prune,
    remove_uncommitted,
)

VOCAB = Vocab.from_genes(["ENSG00000000001", "ENSG00000000002"], ["A", "B"], specials=("<pad>",))
BASE = Manifest(
    family="scgpt",
    model={"family": "scgpt"},
    tokenizer={"name": "bins"},
    objective={"name": "generative"},
    vocab_fingerprint=VOCAB.fingerprint,
    data_fingerprint="d",
)


def state(value):
    optimizer = {"w:0:exp_avg": torch.full((4,), value), "w:0:step": torch.tensor(3.0)}
    return Snapshot(optimizer, {"w": torch.full((2, 2), value)})


@pytest.fixture
def run_dir(tmp_path):
    """A run with three checkpoints, of steps 2, 4 and 6."""

    def commit(name, metrics):
        with open(tmp_path / NOTES, "a") as notes:
            notes.write(json.dumps({**metrics, "name": name}) + "\n")

    saver = Saver(tmp_path, rank=0, vocab=VOCAB, session="s1", commit=commit)
    for step in (2, 4, 6):
        manifest = BASE.at(step, {"epoch": 0, "position": step}, 1, {})
        saver.save(lambda s=step: state(float(s)), manifest, {"step": step}, wait=step == 6)
    return tmp_path


def test_a_save_is_committed_before_the_next_begins(run_dir):
    assert [n["name"] for n in committed(run_dir)] == [f"step-0000000{s}-s1" for s in (2, 4, 6)]
    folder, torn = newest_whole(run_dir)
    assert (folder.name, torn) == ("step-00000006-s1", [])
    manifest, _, weights = read_checkpoint(folder)
    assert manifest.cursor == {"epoch": 0, "position": 6}
    assert weights["w"].tolist() == [[6.0, 6.0], [6.0, 6.0]]
    assert not list(run_dir.rglob("*.partial"))


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "weights.safetensors").write_bytes(b"x"), "'weights.safetensors' is not"),
        (lambda f: (f / "engine" / "seal-00000-of-00001.json").unlink(), "rank 0 of 1 did not"),
        (lambda f: (f / "manifest.json").unlink(), "no manifest.json"),
        (lambda f: shutil.rmtree(f / "engine"), "rank 0 of 1 did not finish it"),
    ],
)
def test_a_torn_checkpoint_is_found_and_the_one_before_it_taken(run_dir, damage, text):
    newest = run_dir / "checkpoints" / "step-00000006-s1"
    damage(newest)
    with pytest.raises(CheckpointError, match=text):
        verify(newest)
    folder, torn = newest_whole(run_dir)
    assert folder.name == "step-00000004-s1"
    assert len(torn) == 1


def test_one_flipped_bit_is_found(run_dir):
    file = run_dir / "checkpoints" / "step-00000006-s1" / "engine"
    file = file / "optimizer-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"optimizer-00000-of-00001.safetensors' is not what"):
        verify(file.parent.parent)


def test_a_note_cut_short_and_a_folder_that_is_gone_are_passed_over(run_dir):
    with open(run_dir / NOTES, "a") as notes:
        notes.write('{"step": 8, "na')
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006-s1")
    assert newest_whole(run_dir)[0].name == "step-00000004-s1"
    drop_after(run_dir / NOTES, 4)
    assert [n["step"] for n in committed(run_dir)] == [2, 4]


def test_a_newest_checkpoint_that_is_gone_and_files_of_another_are_named(run_dir):
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006-s1")
    folder, torn = newest_whole(run_dir)
    assert folder.name == "step-00000004-s1"
    assert "step-00000006-s1' is noted, but gone" in torn[0]
    shard = next((folder / "engine").glob("*.safetensors"))
    shutil.copy(shard, shard.with_name("optimizer-00000-of-00007.safetensors"))
    with pytest.raises(CheckpointError, match="no rank sealed .*00000-of-00007"):
        verify(folder)
    assert newest_whole(run_dir)[0].name == "step-00000002-s1"


def test_the_newest_and_the_best_are_kept(run_dir):
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0)):
        with open(run_dir / "judged.jsonl", "a") as notes:
            note = {"step": step, "validation/loss": loss, "name": f"step-{step:08d}-s1"}
            notes.write(json.dumps(note) + "\n")
    (run_dir / "judged.jsonl").replace(run_dir / NOTES)
    prune(run_dir, keep_last=1)
    left = sorted(f.name for f in (run_dir / "checkpoints").iterdir())
    assert left == ["step-00000004-s1", "step-00000006-s1"]


def test_a_validation_loss_that_is_no_number_is_never_the_best(run_dir):
    with open(run_dir / "judged.jsonl", "a") as notes:
        for step, loss in ((2, math.nan), (4, 0.3), (6, 0.4)):
            note = {"step": step, "validation/loss": loss, "name": f"step-{step:08d}-s1"}
            notes.write(json.dumps(note) + "\n")
    (run_dir / "judged.jsonl").replace(run_dir / NOTES)
    assert [judged_loss(n) for n in committed(run_dir)] == [math.inf, 0.3, 0.4]
    assert judged_loss({"step": 2}) == math.inf
    prune(run_dir, keep_last=1)
    left = sorted(f.name for f in (run_dir / "checkpoints").iterdir())
    assert left == ["step-00000004-s1", "step-00000006-s1"]


def test_what_was_never_committed_is_removed(run_dir):
    half = run_dir / "checkpoints" / "step-00000008-s2"
    (half / "engine").mkdir(parents=True)
    remove_uncommitted(run_dir)
    assert not half.exists()
    assert len(list((run_dir / "checkpoints").iterdir())) == 3


def test_a_rank_that_cannot_write_stops_all_and_leaves_nothing(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    commits = []
    saver = Saver(tmp_path, rank=0, vocab=VOCAB, session="s", commit=lambda *a: commits.append(a))
    with pytest.raises(StoppedError, match=r"rank 0 cannot write the checkpoint of step 2 to"):
        saver.save(lambda: state(1.0), BASE.at(2, {}, 1, {}), {}, wait=True)
    assert not commits


def test_the_cell_log_gives_what_the_last_group_did(tmp_path):
    for session, world, steps in ((1.0, 2, range(4)), (2.0, 1, range(2, 5))):
        for rank in range(world):
            log = CellLog(tmp_path, rank=rank, world=world, session=session)
            for step in steps:
                ids = np.array([step * 10 + rank, 5])
                log.write(step, 0, ids, taken=True)
    with open(tmp_path / "cells" / "rank-00000.jsonl", "a") as file:
        file.write('{"step": 9, "cel')
    found = read_cell_log(tmp_path)
    assert list(found) == [0, 1, 2, 3, 4]
    assert [entry["world"] for entry in found.values()] == [2, 2, 1, 1, 1]
    assert found[1]["cells"][1].tolist() == [11, 5]
    assert list(found[3]["cells"]) == [0]
