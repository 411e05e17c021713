"""Published formats, fabricated: every key used or named, nothing unset, and back again."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import cellray
from cellray.cli import main
from cellray.core import registry
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.infer.import_weights import export_weights, import_weights, read_gene_list
from cellray.train.checkpoint import read_checkpoint
from helpers_upstream import (
    GF,
    SB,
    SF,
    SG,
    TO,
    geneformer_folder,
    scbert_file,
    scbert_weights,
    scfoundation_file,
    scfoundation_weights,
    scgpt_folder,
    scgpt_weights,
    tosica_folder,
    tosica_weights,
)


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def test_every_family_has_an_adapter():
    assert registry.names("cellray.models.upstream") == registry.names("cellray.models")


@pytest.mark.parametrize("second", [False, True])
def test_geneformer_takes_tied_safetensors_of_both_generations(tmp_path, second):
    weights = geneformer_folder(tmp_path / "gf", second=second)
    report = import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    manifest, vocab, _ = read_checkpoint(tmp_path / "out")
    assert manifest.tokenizer["max_tokens"] == GF["P"]
    assert manifest.tokenizer["specials"] is second
    assert manifest.model["cell_embedding"] == ("cls" if second else "mean")
    assert vocab.medians is not None
    assert vocab.medians[3] == np.float32(0.8)
    assert report.num_parameters == sum(v.numel() for v in weights.values())
    back = export_weights(tmp_path / "out")
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert_same_tensors(back, weights | {k: weights[v] for k, v in tied.items()})


def test_geneformer_ignores_position_ids_and_reads_old_bin_files(tmp_path):
    weights = geneformer_folder(tmp_path / "gf", second=False)
    (tmp_path / "gf" / "model.safetensors").unlink()
    weights["bert.embeddings.position_ids"] = torch.arange(GF["P"])[None]
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    torch.save(weights, tmp_path / "gf" / "pytorch_model.bin")
    report = import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    assert list(report.ignored) == ["bert.embeddings.position_ids"]
    assert "counter" in report.ignored["bert.embeddings.position_ids"]
    weights["cls.predictions.decoder.weight"] = torch.zeros(42, GF["H"])
    torch.save(weights, tmp_path / "gf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="decoder.weight differs from .*word_embeddings"):
        import_weights("geneformer", tmp_path / "gf", tmp_path / "out2")


@pytest.mark.parametrize(("kind", "of"), [("sequence", "cell"), ("token", "gene")])
def test_geneformer_classifiers_keep_their_classes(tmp_path, kind, of):
    weights = geneformer_folder(tmp_path / "gf", second=False, kind=kind)
    import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    manifest, _, _ = read_checkpoint(tmp_path / "out")
    assert manifest.classes == ["nf", "hcm", "dcm"]
    assert manifest.classes_of == of
    assert_same_tensors(export_weights(tmp_path / "out"), weights)
    loaded = cellray.load(str(tmp_path / "out"))
    assert loaded.backbone is not loaded.model


def test_geneformer_refuses_the_dictionary_of_another_generation(tmp_path):
    geneformer_folder(tmp_path / "v1", second=False)
    geneformer_folder(tmp_path / "v2", second=True)
    other = str(tmp_path / "v2" / "token_dictionary_gc104M.pkl")
    with pytest.raises(CheckpointError, match="gc104M and '.*' of gc30M: both must be of the one"):
        import_weights("geneformer", tmp_path / "v1", tmp_path / "out", genes=other)
    other = str((tmp_path / "v2" / "token_dictionary_gc104M.pkl").rename(tmp_path / "tokens.pkl"))
    with pytest.raises(CheckpointError, match="44 tokens, the weights .* have 42: .* generation"):
        import_weights("geneformer", tmp_path / "v1", tmp_path / "out", genes=other)
    medians = tmp_path / "medians.json"
    medians.write_text(json.dumps({"ENSG1": 1.0}))
    with pytest.raises(CheckpointError, match="medians lack 40 of the 40 genes"):
        import_weights("geneformer", tmp_path / "v1", tmp_path / "out", medians=str(medians))
    (tmp_path / "v1" / "gene_median_dictionary_gc30M.pkl").unlink()
    with pytest.raises(CheckpointError, match="ranks need the corpus medians"):
        import_weights("geneformer", tmp_path / "v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["flash", "torch", "wrapped"])
def test_scgpt_takes_flash_torch_and_wrapped_names(tmp_path, form):
    weights = scgpt_weights(flash=form == "flash")
    given = weights
    if form == "wrapped":
        given = {n.replace("self_attn.", "self_attn._impl."): v for n, v in weights.items()}
    scgpt_folder(tmp_path / "sg", given)
    report = import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    manifest, vocab, _ = read_checkpoint(tmp_path / "out")
    assert report.num_parameters == sum(v.numel() for v in weights.values())
    assert manifest.model["gen_out_proj"] is False  # as the weights were trained
    assert manifest.tokenizer["cls_value"] == -2
    assert dict(vocab.specials) == {"<pad>": 30, "<cls>": 31, "<eoc>": 32}
    back = export_weights(tmp_path / "out")
    assert_same_tensors(back, {n.replace("Wqkv.", "in_proj_"): v for n, v in weights.items()})


def test_scgpt_takes_fine_tuned_files_with_batches_and_classes(tmp_path):
    weights = scgpt_weights(flash=False, batches=2, classes=4, flag=False)
    scgpt_folder(tmp_path / "sg", weights)
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    manifest, _, _ = read_checkpoint(tmp_path / "out")
    assert manifest.covariates == {"batch": ["0", "1"]}
    assert manifest.classes == ["0", "1", "2", "3"]
    assert manifest.model["domain_norm"] == "domain"
    assert_same_tensors(export_weights(tmp_path / "out"), weights)


def test_scgpt_appends_specials_that_the_vocabulary_lacks(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights(), specials=False)
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    _, vocab, _ = read_checkpoint(tmp_path / "out")
    assert dict(vocab.specials) == {"<pad>": 30, "<cls>": 31, "<eoc>": 32}
    full = {f"GENE{i}": i for i in range(33)}
    (tmp_path / "sg" / "vocab.json").write_text(json.dumps(full))
    with pytest.raises(CheckpointError, match="no special token '<pad>', and all 33 rows"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "out2")
    (tmp_path / "sg" / "vocab.json").write_text(json.dumps({**full, "MORE": 40}))
    with pytest.raises(CheckpointError, match="token ids up to 40, the weights .* 33 rows"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "out2")


def test_skipped_keys_are_an_error_that_lists_them(tmp_path):
    weights = scgpt_weights()
    weights["encoder.surprise"] = torch.zeros(3)
    del weights["decoder.fc.2.bias"]
    scgpt_folder(tmp_path / "sg", weights)
    with pytest.raises(CheckpointError) as caught:
        import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    assert "1 tensors are missing: decoder.fc.2.bias" in str(caught.value)
    assert "1 tensors have no place: encoder.surprise" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_scbert_takes_the_float64_table_and_names_what_it_leaves_out(tmp_path, prefix):
    weights = scbert_weights()
    file = scbert_file(tmp_path / "panglao_pretrain.pth", weights, prefix=prefix)
    report = import_weights("scbert", file, tmp_path / "out")
    assert set(report.ignored) == {
        "epoch", "optimizer_state_dict", "scheduler_state_dict", "losses"
    }  # fmt: skip
    _, vocab, ours = read_checkpoint(tmp_path / "out")
    assert ours["genes.weight"].dtype == torch.float32
    assert int(ours["encoder.schedule.calls"]) == 41
    assert vocab.gene_ids[:2] == ("GENE0", "GENE1")
    assert_same_tensors(export_weights(tmp_path / "out"), weights)


def test_scbert_fine_tuned_file(tmp_path):
    weights = scbert_weights(classes=3)
    file = scbert_file(tmp_path / "finetuned.pth", weights)
    labels = tmp_path / "label_dict.pkl"
    labels.write_bytes(pickle.dumps(np.array(["a", "b", "c"])))
    import_weights("scbert", file, tmp_path / "out", labels=str(labels))
    manifest, _, _ = read_checkpoint(tmp_path / "out")
    assert manifest.classes == ["a", "b", "c"]
    assert manifest.model["masked_head"] is False
    assert_same_tensors(export_weights(tmp_path / "out"), weights)
    labels.write_bytes(pickle.dumps(["a", "b"]))
    with pytest.raises(CheckpointError, match="classifier of 3 classes, and 2 labels"):
        import_weights("scbert", file, tmp_path / "out2", labels=str(labels))


def test_scbert_refuses_another_gene_list(tmp_path):
    file = scbert_file(tmp_path / "x.pth", scbert_weights())
    (tmp_path / "genes.txt").write_text("A\nB\n")
    with pytest.raises(CheckpointError, match=f"lists 2 genes, .* are of {SB['genes']}"):
        import_weights("scbert", file, tmp_path / "out")
    (tmp_path / "genes.txt").unlink()
    with pytest.raises(CheckpointError, match="without their genes: give .* --genes"):
        import_weights("scbert", file, tmp_path / "out")


@pytest.mark.parametrize(("entry", "shift"), [("gene", 0), ("", 1), ("cell", 1), ("rde", 2)])
def test_scfoundation_takes_one_of_three_entries(tmp_path, entry, shift):
    weights = scfoundation_weights()
    file = scfoundation_file(tmp_path / "models.ckpt", weights)
    report = import_weights("scfoundation", file, tmp_path / "out", entry=entry)
    assert "non-commercial" in report.notes[0]
    want = {**weights, "to_final.bias": weights["to_final.bias"] + shift}
    assert_same_tensors(export_weights(tmp_path / "out"), want)
    _, vocab, ours = read_checkpoint(tmp_path / "out")
    assert dict(vocab.specials) == {"<T>": 25, "<S>": 26, "<pad>": 27}
    assert int(ours["decoder.schedule.calls"]) == 12
    with pytest.raises(ConfigError, match="no entry 'rce'. Did you mean 'rde'"):
        import_weights("scfoundation", file, tmp_path / "out2", entry="rce")


def test_tosica_keeps_the_mask_as_gene_sets_and_the_compat_layout(tmp_path):
    weights = tosica_weights()
    tosica_folder(tmp_path / "to", weights)
    report = import_weights("tosica", tmp_path / "to", tmp_path / "out")
    assert list(report.ignored) == ["feature_embed.fe.mask"]
    manifest, vocab, ours = read_checkpoint(tmp_path / "out")
    assert manifest.model["token_layout"] == "interleaved"
    assert manifest.classes == ["alpha", "beta", "delta"]
    assert list(vocab.gene_sets) == [*(f"SET{i}" for i in range(5)), "node 0"]
    assert len(vocab.gene_sets["node 0"]) == TO["genes"]
    members = sum(len(genes) for genes in vocab.gene_sets.values())
    assert ours["backbone.projection.weight"].shape == (members, TO["W"])
    del weights["feature_embed.fe.mask"]
    assert_same_tensors(export_weights(tmp_path / "out"), weights)


FILES = {
    "geneformer": lambda p: geneformer_folder(p, second=True),
    "scgpt": lambda p: scgpt_folder(p, scgpt_weights()),
    "scbert": lambda p: scbert_file(p / "x.pth", scbert_weights()),
    "scfoundation": lambda p: scfoundation_file(p / "models.ckpt", scfoundation_weights()),
    "tosica": lambda p: tosica_folder(p, tosica_weights()),
}
WEIGHTS = {
    "geneformer": "model.safetensors",
    "scgpt": "best_model.pt",
    "scbert": "x.pth",
    "scfoundation": "models.ckpt",
    "tosica": "model-10.pth",
}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("other", sorted(FILES))
def test_weights_of_another_family_are_refused_by_name(tmp_path, name, other):
    if name == other:
        return
    FILES[other](tmp_path / "theirs")
    file = tmp_path / "theirs" / WEIGHTS[other]
    with pytest.raises(CheckpointError) as caught:
        import_weights(name, file, tmp_path / "out", genes=str(genes_file(tmp_path)))
    text = str(caught.value)
    assert f"look like those of '{other}'" in text or "config.json" in text, text


def genes_file(folder: Path) -> Path:
    (folder / "some.txt").write_text("A\nB\n")
    return folder / "some.txt"


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    FILES[name](tmp_path / "it")
    file = tmp_path / "it" / WEIGHTS[name]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    source = file if name == "scbert" else file.parent
    with pytest.raises(CheckpointError, match="truncated or no"):
        import_weights(name, source, tmp_path / "out")


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_a_file_that_holds_code_is_refused_and_says_what_it_found(tmp_path, capsys):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    torch.save({**scgpt_weights(), "extra": Payload()}, tmp_path / "sg" / "best_model.pt")
    with pytest.raises(CheckpointError, match=r"holds more than tensors \(.*print.*--allow-code"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    assert "code was run" not in capsys.readouterr().out
    geneformer_folder(tmp_path / "gf", second=False)
    dictionary = tmp_path / "gf" / "token_dictionary_gc30M.pkl"
    dictionary.write_bytes(pickle.dumps({"a": Payload()}))
    with pytest.raises(CheckpointError, match=r"more than plain values \(.*print.*--allow-code"):
        import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    assert "code was run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_with_the_flag_code_is_run_and_other_values_stay_out(tmp_path):
    import argparse

    file = scbert_file(tmp_path / "x.pth", scbert_weights())
    raw = torch.load(file, weights_only=True)
    torch.save({**raw, "args": argparse.Namespace(lr=1)}, file)
    with pytest.raises(CheckpointError, match="argparse.Namespace"):
        import_weights("scbert", file, tmp_path / "out")
    report = import_weights("scbert", file, tmp_path / "out", allow_code=True)
    assert "args" in report.ignored


def test_a_tensor_of_the_wrong_size_is_refused_by_name(tmp_path):
    weights = scgpt_weights()
    weights["decoder.fc.2.weight"] = torch.zeros(3, SG["D"])
    scgpt_folder(tmp_path / "sg", weights)
    with pytest.raises(CheckpointError, match=r"1 of another size: .*layers.2.weight \(3, 32\)"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "out")


def test_the_command_line_reports_and_refuses(tmp_path, capsys):
    scfoundation_file(tmp_path / "models.ckpt", scfoundation_weights())
    words = ["import-weights", "scfoundation", str(tmp_path / "models.ckpt")]
    assert main([*words, str(tmp_path / "out"), "--entry", "rde"]) == 0
    assert f"{SF['genes']} genes" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "out")]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["import-weights", "scgtp", "x", "y"]) == 1
    assert "Did you mean 'scgpt'" in capsys.readouterr().err
    assert main(["import-weights", "scgpt", str(tmp_path / "nowhere"), "y"]) == 1
    assert "best_model.pt" in capsys.readouterr().err


def test_gene_lists_in_every_form(tmp_path):
    names = ["B", "A", "C"]
    (tmp_path / "a.txt").write_text("B\nA\nC\n")
    (tmp_path / "b.tsv").write_text("gene_name\tindex\nA\t1\nB\t0\nC\t2\n")
    (tmp_path / "c.json").write_text(json.dumps({"B": 0, "A": 1, "C": 2}))
    np.save(tmp_path / "d.npy", np.array(names))
    for file in sorted(tmp_path.iterdir()):
        assert list(read_gene_list(file).names) == names, file
    (tmp_path / "b.tsv").write_text("gene_name\tindex\nA\t1\nB\t0\nC\t7\n")
    with pytest.raises(DataError, match="'index' is not 0 .. 2"):
        read_gene_list(tmp_path / "b.tsv")
    (tmp_path / "e.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(DataError, match="has the columns x, y; a gene table needs one of"):
        read_gene_list(tmp_path / "e.tsv")
