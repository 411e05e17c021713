"""Imports that would give another model than the published one are refused, and say why."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import cellray
from cellray.cli import main
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.infer.import_weights import export_weights, import_weights
from cellray.tasks.base import task
from cellray.train.checkpoint import model_of, read_checkpoint, write_checkpoint
from cellray.train.finetune import _check_needs
from cellray.train.job import fitting_weights
from helpers_upstream import (
    SG,
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


def change(path: Path, **values: object) -> None:
    """Set keys of a JSON file; None takes a key away."""
    raw = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def refused(name: str, source: Path, pattern: str, kind: type = CheckpointError, **given) -> None:
    with pytest.raises(kind, match=pattern):
        import_weights(name, source, source.parent / "out", **given)
    assert not (source.parent / "out").exists()
    assert not list(source.parent.glob("out*partial"))


# ------------------------------------------------------------------ two names for one tensor
def test_two_names_for_one_tensor_are_named(tmp_path):
    weights = scgpt_weights()
    plain = "transformer_encoder.layers.0.self_attn.in_proj_weight"
    scgpt_folder(tmp_path / "sg", {**weights, plain: torch.zeros(3 * SG["D"], SG["D"])})
    refused("scgpt", tmp_path / "sg", r"twice, '.*0.self_attn.Wqkv.weight' and '.*in_proj_weight'")

    file = scfoundation_file(tmp_path / "sf" / "models.ckpt", scfoundation_weights())
    raw = torch.load(file)
    raw["cell"]["state_dict"]["ema.model.norm.weight"] = torch.zeros(16)
    torch.save(raw, file)
    refused("scfoundation", file, "twice, 'model.norm.weight' and 'ema.model.norm.weight'")


# ------------------------------------------------------------------ vocabularies
def vocabulary(folder: Path, table: dict[str, object] | str) -> None:
    text = table if isinstance(table, str) else json.dumps(table)
    (folder / "vocab.json").write_text(text)


def test_the_vocabulary_of_a_smaller_model_is_refused(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    vocabulary(tmp_path / "sg", {f"GENE{i}": i for i in range(20)})
    refused("scgpt", tmp_path / "sg", "names 20 of the 33 rows .* vocabulary of another model")
    vocabulary(tmp_path / "sg", {"<pad>": 0, "<cls>": 1})
    refused("scgpt", tmp_path / "sg", "names 2 of the 33 rows")
    vocabulary(tmp_path / "sg", {f"<{i}>": i for i in range(33)})
    refused("scgpt", tmp_path / "sg", "no special token '<pad>'")


@pytest.mark.parametrize(
    ("table", "pattern"),
    [
        ({"A": 0, "B": 1, "C": 1}, r"1 token ids to more than one gene: 1 to B, C"),
        ({"A": 0, "B": -1}, "'B' the token id -1; ids are 0, 1, 2"),
        ({"A": 0.5, "B": 1}, "'A' the token id 0.5"),
        ({"A": None}, "no dictionary of gene -> token id"),
        ('{"A": 0, "B": 1, "A": 2}', "names occur twice in it: A"),
        ({}, "lists no gene"),
    ],
)
def test_token_ids_are_whole_and_belong_to_one_gene(tmp_path, table, pattern):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    vocabulary(tmp_path / "sg", table)
    refused("scgpt", tmp_path / "sg", pattern, DataError)


def test_token_ids_with_a_hole_are_refused(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    table = {f"GENE{i}": i + (i > 5) for i in range(30)}
    vocabulary(tmp_path / "sg", table)
    refused("scgpt", tmp_path / "sg", "token ids are not 0 .. 29, each once")


def test_a_dictionary_of_half_a_generation_is_refused(tmp_path):
    weights = geneformer_folder(tmp_path / "gf", second=False)
    assert len(weights["cls.predictions.bias"]) == 42
    file = tmp_path / "gf" / "token_dictionary_gc30M.pkl"
    tokens = pickle.loads(file.read_bytes())
    tokens["<cls>"] = tokens.pop("ENSG00000000000")
    file.write_bytes(pickle.dumps(tokens))
    refused("geneformer", tmp_path / "gf", "one of '<cls>' and '<eos>' only")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_medians_divide(tmp_path, value):
    geneformer_folder(tmp_path / "gf", second=True)
    file = tmp_path / "gf" / "gene_median_dictionary_gc104M.pkl"
    medians = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps({**medians, "ENSG00000000003": np.float64(value)}))
    refused("geneformer", tmp_path / "gf", "1 medians are not above 0, e.g. ENSG00000000003")


# ------------------------------------------------------------------ several files could be meant
def test_several_dictionaries_are_listed_with_the_option_that_chooses(tmp_path):
    folder = tmp_path / "gf"
    geneformer_folder(folder, second=True)
    tokens, medians = "token_dictionary_gc104M.pkl", "gene_median_dictionary_gc104M.pkl"
    older = shutil.copy(folder / tokens, folder / "token_dictionary_gc95M.pkl")
    pattern = f"2 gene lists: {tokens}, token_dictionary_gc95M.pkl; say which with --genes"
    refused("geneformer", folder, pattern)
    Path(older).unlink()
    wrong = pickle.dumps({f"ENSG{i:011d}": 9.0 for i in range(40)})
    (folder / "gene_median_dictionary_gc95M.pkl").write_bytes(wrong)
    refused("geneformer", folder, "2 files of medians: .*; say which with --medians")
    (folder / medians).unlink()
    refused("geneformer", folder, "of the generation gc104M and .* of gc95M")
    names = {"S1": "ENSG00000000001"}
    for generation in ("gc95M", "gc104M"):
        (folder / f"gene_name_id_dict_{generation}.pkl").write_bytes(pickle.dumps(names))
        names = {"TP53": "ENSG00000000001"}
    given = tmp_path / "m.pkl"
    (folder / "gene_median_dictionary_gc95M.pkl").rename(given)
    import_weights("geneformer", folder, tmp_path / "taken", medians=str(given))
    assert read_checkpoint(tmp_path / "taken")[1].symbols[1] == "TP53"  # of the same generation


def test_several_references_and_several_weights_are_listed(tmp_path):
    tosica_folder(tmp_path / "to", tosica_weights())
    (tmp_path / "to" / "genes.txt").unlink()
    for name in ("query", "reference"):
        cells = ad.AnnData(np.zeros((1, 30), np.float32))
        cells.var.index = [f"GENE{i}" for i in range(30)]
        cells.write_h5ad(tmp_path / "to" / f"{name}.h5ad")
    refused("tosica", tmp_path / "to", "2 gene lists: query.h5ad, reference.h5ad; .* --genes")
    tosica_folder(tmp_path / "two", tosica_weights())
    shutil.copy(tmp_path / "two" / "model-10.pth", tmp_path / "two" / "old-10.pth")
    refused("tosica", tmp_path / "two", "of the last epoch: model-10.pth, old-10.pth")
    scbert_file(tmp_path / "sb" / "x.pth", scbert_weights())
    shutil.copy(tmp_path / "sb" / "x.pth", tmp_path / "sb" / "y.pth")
    refused("scbert", tmp_path / "sb", "2 files of weights: x.pth, y.pth; give one of them as SRC")


# ------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("norm_scheme", "pre", "norm_scheme 'pre', which changes what .* only 'post'"),
        ("pre_norm", True, "pre_norm True"),
        ("input_style", "log1p", "input_style 'log1p'"),
        ("input_emb_style", "category", "input_emb_style 'category'"),
        ("cell_emb_style", "avg-pool", "cell_emb_style 'avg-pool'"),
        ("nlayers", 3, "nlayers 3, and the weights have 2"),
        ("embsize", 64, "embsize 64, and the weights have 32"),
        ("nheads", "four", "'nheads' is 'four'; it must be a number"),
        ("n_bins", 0, "'n_bins' is 0; it must be 1, 2, 3"),
        ("max_seq_len", 1.5, "'max_seq_len' is 1.5"),
        ("pad_value", "x", "'pad_value' is 'x'"),
        ("dropout", [], r"'dropout' is \[\]"),
    ],
)
def test_args_that_change_the_mathematics_are_checked(tmp_path, key, value, pattern):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    change(tmp_path / "sg" / "args.json", **{key: value})
    refused("scgpt", tmp_path / "sg", pattern)


@pytest.mark.parametrize(
    ("key", "value", "pattern"),
    [
        ("position_embedding_type", "relative_key", "position_embedding_type 'relative_key'"),
        ("model_type", "roberta", "model_type 'roberta'"),
        ("hidden_act", "gelu_new", "hidden_act 'gelu_new'.* 'relu' and 'gelu'"),
        ("pad_token_id", 1, "pad_token_id 1"),
        ("num_attention_heads", "x", "'num_attention_heads' is 'x'"),
        ("layer_norm_eps", "small", "'layer_norm_eps' is 'small'"),
    ],
)
def test_configurations_of_geneformer_are_checked(tmp_path, key, value, pattern):
    geneformer_folder(tmp_path / "gf", second=True)
    change(tmp_path / "gf" / "config.json", **{key: value})
    refused("geneformer", tmp_path / "gf", pattern)


def test_null_where_a_number_belongs_is_refused(tmp_path):
    geneformer_folder(tmp_path / "gf", second=True)
    file = tmp_path / "gf" / "config.json"
    file.write_text(
        file.read_text().replace('"num_attention_heads": 4', '"num_attention_heads": null')
    )
    refused("geneformer", tmp_path / "gf", "'num_attention_heads' is None; it must be a number")


def test_scfoundation_entries_must_be_tables_of_their_own_size(tmp_path):
    file = scfoundation_file(tmp_path / "models.ckpt", scfoundation_weights())
    raw = torch.load(file)
    parts = raw["cell"]["config"]["model_config"]["mae_autobin"]
    parts["encoder"]["depth"] = 7
    torch.save(raw, file)
    refused("scfoundation", file, "encoder in the configuration .* depth 7, and the weights have 2")
    torch.save({"cell": {"config": {}, "state_dict": None}}, file)
    refused("scfoundation", file, "'state_dict' is a NoneType")
    torch.save({"cell": {"config": "x", "state_dict": {}}}, file)
    refused("scfoundation", file, "its configuration a str")


# ------------------------------------------------------------------ tensors that are no weights
def test_values_that_are_no_weights_are_refused(tmp_path):
    weights = scgpt_weights()
    name = "decoder.fc.2.weight"
    kinds = {
        "1 tensors hold NaN or infinity: decoder.fc.2.weight": weights[name] / 0,
        r"no plain numbers: decoder.fc.2.weight \(complex64": weights[name].to(torch.complex64),
        r"no plain numbers: decoder.fc.2.weight \(float32, sparse_coo": weights[name].to_sparse(),
        r"no plain numbers: decoder.fc.2.weight \(float32, strided, meta": weights[name].to("meta"),
        "1 of integers where the model has fractions: .* int8": weights[name].to(torch.int8),
    }
    for number, (pattern, value) in enumerate(kinds.items()):
        scgpt_folder(tmp_path / str(number), {**weights, name: value})
        refused("scgpt", tmp_path / str(number), pattern)


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (lambda mask: mask * 0.5, "holds more than 0 and 1; it is no mask"),
        (lambda mask: mask.T.contiguous(), r"is \(30, 48\) and the weights it masks \(48, 30\)"),
        (lambda mask: mask[:-1], r"is \(47, 30\) and the weights it masks"),
    ],
)
def test_masks_are_of_zeros_and_ones(tmp_path, edit, pattern):
    weights = tosica_weights()
    weights["feature_embed.fe.mask"] = edit(weights["feature_embed.fe.mask"])
    tosica_folder(tmp_path / "to", weights)
    refused("tosica", tmp_path / "to", pattern)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_wrappers_are_taken_off(tmp_path, wrapper):
    weights = scgpt_weights(flash=False)
    scgpt_folder(tmp_path / "sg", {f"{wrapper}{name}": value for name, value in weights.items()})
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    assert export_weights(tmp_path / "out").keys() == weights.keys()
    if wrapper == "module.":
        held = geneformer_folder(tmp_path / "gf", second=False)
        (tmp_path / "gf" / "model.safetensors").unlink()
        given = {f"module.{name}": value for name, value in held.items()}
        torch.save(given, tmp_path / "gf" / "pytorch_model.bin")
        import_weights("geneformer", tmp_path / "gf", tmp_path / "out2")
        assert export_weights(tmp_path / "out2").keys() >= held.keys()


@pytest.mark.parametrize(
    ("made", "pattern"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "encoder.embedding.weight"},
         "tensors are missing: encoder.embedding.weight; it holds decoder"),
        (lambda w: {**w, "encoder.embedding.weight": torch.zeros(33)}, "tensors without 2 axes"),
        (lambda w: {0: torch.zeros(3), 1: torch.ones(2)}, "not a published .* It holds 0, 1"),
        (lambda w: {"model_state_dict": w, "epoch": 1}, "one level down, in 'model_state_dict'"),
    ],
)  # fmt: skip
def test_files_without_the_tensors_that_tell_sizes_are_refused(tmp_path, made, pattern):
    scgpt_folder(tmp_path / "sg", made(scgpt_weights()))
    refused("scgpt", tmp_path / "sg", pattern)


def test_roberta_is_refused_by_its_keys(tmp_path):
    held = geneformer_folder(tmp_path / "gf", second=False)
    (tmp_path / "gf" / "model.safetensors").unlink()
    given = {name.replace("bert.", "roberta."): value for name, value in held.items()}
    torch.save(given, tmp_path / "gf" / "pytorch_model.bin")
    refused("geneformer", tmp_path / "gf", "missing: bert.embeddings.word_embeddings.weight")


# ------------------------------------------------------------------ what is told
def test_everything_beside_the_tensors_is_named(tmp_path):
    scgpt_folder(tmp_path / "sg", {**scgpt_weights(), "note": "hello", "best": np.float64(0.5)})
    report = import_weights("scgpt", tmp_path / "sg", tmp_path / "o1")
    assert dict(report.ignored) == {"note": "str, no tensor", "best": "float64, no tensor"}

    weights = scbert_weights()
    file = scbert_file(tmp_path / "x.pth", weights)
    extra = {"epoch": 1, "ema": [torch.ones(2)], "state": {"a": torch.ones(2)}}
    torch.save({**weights, **extra}, file)
    report = import_weights("scbert", file, tmp_path / "o2")
    assert set(report.ignored) == {"epoch", "ema", "state"}
    torch.save({"model_state_dict": {**weights, "ema": {"a": torch.ones(2)}}, "losses": 1}, file)
    report = import_weights("scbert", file, tmp_path / "o3")
    assert set(report.ignored) == {"model_state_dict.ema", "losses"}

    file = scfoundation_file(tmp_path / "sf" / "models.ckpt", scfoundation_weights())
    torch.save({**torch.load(file), "optimizer": {"a": torch.ones(2)}}, file)
    report = import_weights("scfoundation", file, tmp_path / "o4")
    told = {"gene": "another entry", "rde": "another entry", "optimizer": "not of the model"}
    assert dict(report.ignored) == told


def test_rounded_tables_and_lost_names_are_noted(tmp_path):
    weights = scbert_weights(classes=3)
    weights["pos_emb.emb.weight"] = weights["pos_emb.emb.weight"] / 3
    report = import_weights("scbert", scbert_file(tmp_path / "x.pth", weights), tmp_path / "o1")
    assert any("it was rounded" in note for note in report.notes)
    assert any("nothing names the classes (3)" in note for note in report.notes)

    scgpt_folder(tmp_path / "sg", scgpt_weights())
    (tmp_path / "sg" / "args.json").unlink()
    report = import_weights("scgpt", tmp_path / "sg", tmp_path / "o0", heads=SG["heads"])
    assert "no args.json" in report.notes[0]

    tosica_folder(tmp_path / "to", tosica_weights())
    (tmp_path / "to" / "label_dictionary.csv").unlink()
    (tmp_path / "to" / "pathway.csv").unlink()
    report = import_weights("tosica", tmp_path / "to", tmp_path / "o2")
    told = " | ".join(report.notes)
    for words in ("how many heads", "no pathway.csv names", "nothing names the classes (3)"):
        assert words in told

    geneformer_folder(tmp_path / "gf", second=True, kind="sequence")
    change(tmp_path / "gf" / "config.json", id2label={"0": "a", "1": "b"})
    report = import_weights("geneformer", tmp_path / "gf", tmp_path / "o3")
    assert "names 2 classes, the classifier has 3" in " ".join(report.notes)


def test_a_fine_tuned_scgpt_takes_the_value_of_the_tuning_scripts(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights(classes=3, flag=False))
    report = import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    assert read_checkpoint(tmp_path / "out")[0].tokenizer["cls_value"] == 0
    assert "tokenizer.cls_value is 0" in report.notes[0]


@pytest.mark.parametrize("column", ["label_dictionary.csv", "pathway.csv"])
def test_tables_of_one_column_are_refused(tmp_path, column):
    tosica_folder(tmp_path / "to", tosica_weights())
    rows = (tmp_path / "to" / column).read_text().splitlines()
    (tmp_path / "to" / column).write_text("\n".join(row.split(",")[1] for row in rows))
    refused("tosica", tmp_path / "to", "has one column; TOSICA writes two")
    (tmp_path / "to" / column).write_bytes(b",0\n0,\xff\n")
    refused("tosica", tmp_path / "to", "cannot be read as text", DataError)


def test_classes_are_named_once_each(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights(classes=3, flag=False))
    (tmp_path / "l.txt").write_text("a\na\nb\n")
    refused("scgpt", tmp_path / "sg", "have a name twice: a", labels=str(tmp_path / "l.txt"))
    geneformer_folder(tmp_path / "gf", second=True, kind="sequence")
    for table in ({"x": "a", "y": "b", "z": "c"}, {"0": "a", "1": "b", "7": "c"}):
        change(tmp_path / "gf" / "config.json", id2label=table)
        refused("geneformer", tmp_path / "gf", "id2label numbers its classes .* they are 0 .. 2")


# ------------------------------------------------------------------ classifiers of genes
def test_a_token_classifier_with_a_pooler_is_one_of_genes(tmp_path):
    from safetensors.torch import save_file

    weights = geneformer_folder(tmp_path / "gf", second=True, kind="sequence")
    save_file(weights, tmp_path / "gf" / "model.safetensors")
    change(tmp_path / "gf" / "config.json", architectures=["BertForTokenClassification"])
    report = import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    assert set(report.ignored) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert read_checkpoint(tmp_path / "out")[0].classes_of == "gene"
    cells = ad.AnnData(np.ones((1, 22), np.float32))
    cells.var.index = [f"ENSG{i:011d}" for i in range(22)]
    model = cellray.load(str(tmp_path / "out"))
    assert model.embed(cells).shape == (1, 32)
    with pytest.raises(CheckpointError, match="classifies the genes of a cell, not cells"):
        model.annotate(cells)


def test_a_classifier_of_genes_may_be_fine_tuned_for_cells(tmp_path):
    weights = geneformer_folder(tmp_path / "gf", second=True, kind="token")
    import_weights("geneformer", tmp_path / "gf", tmp_path / "out")
    manifest, vocab, ours = read_checkpoint(tmp_path / "out")
    _check_needs(task("annotation"), manifest, vocab)
    cells = replace(manifest, classes=["a", "b"], classes_of="cell")
    with torch.device("meta"):
        model = model_of(cells, vocab)
    assert len(fitting_weights(model, ours)) == len(ours) - 2  # all but the classifier
    assert "classifier.weight" in weights


# ------------------------------------------------------------------ options and targets
@pytest.mark.parametrize(
    ("name", "given", "pattern"),
    [
        ("scgpt", {"entry": "rde"}, "scgpt has no use for --entry; it takes --genes, --labels"),
        ("scgpt", {"medians": "m.pkl"}, "no use for --medians"),
        ("scgpt", {"heads": 2}, "says that it has 4 heads; leave out --heads 2"),
        ("scgpt", {"labels": "l.txt"}, "has no classifier that --labels could name"),
    ],
)
def test_options_without_a_use_are_refused(tmp_path, monkeypatch, name, given, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.txt").write_text("a\nb\n")
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    refused(name, tmp_path / "sg", pattern, ConfigError, **given)


def test_heads_and_entries_that_the_file_tells_are_refused(tmp_path):
    geneformer_folder(tmp_path / "gf", second=True)
    refused("geneformer", tmp_path / "gf", "no use for --heads", ConfigError, heads=2)
    file = scfoundation_file(tmp_path / "models.ckpt", scfoundation_weights())
    refused("scfoundation", file, "has 2 heads; leave out --heads 4", ConfigError, heads=4)
    one = torch.load(file)["cell"]
    torch.save(one, file)
    pattern = "one model without entries; leave out --entry rde"
    refused("scfoundation", file, pattern, ConfigError, entry="rde")
    import_weights("scfoundation", file, tmp_path / "out2")
    torch.save(one["state_dict"], file)
    refused("scfoundation", file, "does not say how many heads .* or --heads 12")
    import_weights("scfoundation", file, tmp_path / "out3", heads=2)


def test_targets_that_cannot_be_written_leave_nothing(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="link' exists"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "link")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        import_weights("scgpt", tmp_path / "sg", tmp_path / "file" / "out")
    mine = tmp_path / "out.partial"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    assert (mine / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out", "out.partial"]


def test_names_that_are_no_family_are_refused_with_those_there_are(capsys):
    assert main(["import-weights", "base", "x", "y"]) == 1
    told = capsys.readouterr().err
    assert "no family 'base' whose published weights can be read" in told
    assert "geneformer, scbert, scfoundation, scgpt, tosica" in told


def test_export_warns_of_parts_of_our_own(tmp_path):
    scgpt_folder(tmp_path / "sg", scgpt_weights())
    import_weights("scgpt", tmp_path / "sg", tmp_path / "out")
    manifest, vocab, _ = read_checkpoint(tmp_path / "out")
    ours = replace(
        manifest,
        model={**manifest.model, "conditions": ["donor"]},
        covariates={"donor": ["a", "b"]},
    )
    weights = model_of(ours, vocab).state_dict()
    write_checkpoint(tmp_path / "own", ours, vocab=vocab, weights=weights)
    with pytest.warns(UserWarning, match="1 tensors .* no published name .*conditions.donor"):
        export_weights(tmp_path / "own")
