"""Files beside published weights: what is read, what is refused, and that no code is run."""

from __future__ import annotations

import collections
import gzip
import json
import pickle
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from cellray.core.errors import CheckpointError, DataError
from cellray.data.vocab import Vocab
from cellray.models.upstream._gene_lists import (
    generation,
    read_gene_list,
    read_labels,
    read_medians,
    read_symbols,
)
from cellray.models.upstream._reading import read_plain_pickle, read_tensors


class Calls:
    """Pickles to a call of ``function``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


# ------------------------------------------------------------------ weights
@pytest.mark.parametrize("modern", [True, False])
def test_code_in_files_of_either_format_is_named_and_not_run(tmp_path, capsys, modern):
    file = tmp_path / "x.pt"
    held = {"w": torch.ones(2), "x": Calls(print, "run"), "y": Calls(eval, "1")}
    torch.save(held, file, _use_new_zipfile_serialization=modern)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(file, allow_code=False)
    told = str(caught.value)
    assert "print" in told
    assert "eval" in told
    assert "--allow-code" in told
    assert "weights_only" not in told  # torch's advice to read it without the safeguard
    assert "run" not in capsys.readouterr().out


def test_code_of_torch_itself_is_named(tmp_path):
    torch.save({"x": Calls(torch.hub.load_state_dict_from_url, "file:///x")}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\(torch.hub.load_state_dict_from_url\)"):
        read_tensors(tmp_path / "x.pt", allow_code=False)
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"container.Sequential.*linear.Linear"):
        read_tensors(tmp_path / "x.pt", allow_code=False)


def test_numbers_of_numpy_beside_tensors_are_plain(tmp_path):
    held = {"w": torch.ones(2), "loss": np.float64(1.5), "step": np.int64(3), "f": np.float32(2)}
    torch.save(held, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt", allow_code=False)
    assert (found["loss"], found["step"], found["f"]) == (1.5, 3, 2)


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"<html>404</html>", "no torch file but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid x", "git-lfs's pointer .* git lfs pull"),
        (b"", "truncated or no torch file"),
        (b"hello world, this is text", "truncated or no torch file"),
    ],
)
def test_files_that_are_no_weights_say_what_they_are(tmp_path, data, pattern):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_tensors(tmp_path / "x.pt", allow_code=False)
    assert "weights_only" not in str(caught.value)
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=pattern.replace("torch file", "safetensors")[:40]):
        read_tensors(tmp_path / "x.safetensors", allow_code=False)


# ------------------------------------------------------------------ dictionaries
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol_are_read(tmp_path, protocol):
    medians = {"A": np.float64(1.5), "B": np.float32(2)}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(medians, protocol=protocol))
    assert read_medians(tmp_path / "m.pkl", allow_code=False) == {"A": 1.5, "B": 2.0}


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_in_pickles_is_named_at_every_place(tmp_path, protocol, capsys):
    file = tmp_path / "t.pkl"
    held = [{"a": Calls(exec, "print('run')")}, Calls(eval, "1"), Calls(exec, "print('run')")]
    file.write_bytes(pickle.dumps(held, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"\(\w+.exec, \w+.eval\): reading it may run code"):
        read_plain_pickle(file, allow_code=False)
    file.write_bytes(pickle.dumps(collections.defaultdict(int), protocol=protocol))
    with pytest.raises(CheckpointError, match="collections.defaultdict"):
        read_plain_pickle(file, allow_code=False)
    assert "run" not in capsys.readouterr().out


def test_codecs_in_pickles_are_bound_to_one_encoding(tmp_path):
    import _codecs

    (tmp_path / "t.pkl").write_bytes(pickle.dumps(Calls(_codecs.encode, "x", "rot13")))
    with pytest.raises(CheckpointError, match="_codecs.encode with 'rot13'"):
        read_plain_pickle(tmp_path / "t.pkl", allow_code=False)


def write(file: Path, raw: object) -> Path:
    """JSON, pickle, array or text, as the name says."""
    if file.suffix == ".json":
        file.write_text(json.dumps(raw))
    elif file.suffix == ".npy":
        np.save(file, raw)
    elif isinstance(raw, str) and file.suffix != ".pkl":
        file.write_text(raw)
    else:
        file.write_bytes(pickle.dumps(raw))
    return file


@pytest.mark.parametrize(
    ("name", "raw", "pattern"),
    [
        ("g.npy", np.ones((3, 2)), r"holds an array of float64 \(3, 2\), not a list of gene names"),
        ("g.npy", np.arange(3), r"holds an array of int64 \(3,\)"),
        ("g.pkl", 5, "holds int, not a list of gene names"),
        ("g.pkl", "ABC", "holds str, not a list"),
        ("g.pkl", ["A", 1], "holds list, not a list of gene names"),
        ("g.txt", "0\n1\n2\n", "lists the numbers of its rows, 0 .. 2, instead of genes"),
        ("g.txt", "1\n2\n3\n", "lists the numbers of its rows, 1 .. 3"),
        ("g.txt", "A\nB\nA\n", r"lists genes more than once \(1\): A"),
        (
            "g.tsv",
            "gene_name\tindex\nA\t0\nA\t1\n",
            r"^'[^']*' lists genes more than once \(1\): A",
        ),
        ("g.tsv", "token_id\ttoken\n0\tA\n0\tB\n", "1 token ids to more than one gene"),
        ("g.txt", "\n \n", "lists no gene"),
        ("g.pkl", {"A": float("inf")}, "no dictionary of gene -> token id"),
    ],
)
def test_what_is_no_list_of_genes_is_refused(tmp_path, name, raw, pattern):
    with pytest.raises(DataError, match=pattern):
        read_gene_list(write(tmp_path / name, raw))


def test_an_h5ad_of_row_numbers_is_refused(tmp_path):
    cells = ad.AnnData(np.zeros((1, 3), np.float32))
    cells.var["gene_name"] = ["A", "B", "C"]
    cells.write_h5ad(tmp_path / "g.h5ad")
    with pytest.raises(DataError, match="numbers of its rows, 0 .. 2"):
        read_gene_list(tmp_path / "g.h5ad")


def test_a_byte_order_mark_is_no_part_of_a_gene(tmp_path):
    (tmp_path / "g.txt").write_bytes("\ufeffA\nB\n".encode())
    assert read_gene_list(tmp_path / "g.txt").names == ("A", "B")


def test_damaged_archives_are_refused(tmp_path):
    names = "\n".join(f"GENE{i * 7919 % 1009}" for i in range(200))
    data = bytearray(gzip.compress(names.encode()))
    data[40:60] = b"\x55" * 20
    for name in ("g.txt.gz", "g.json.gz"):
        (tmp_path / name).write_bytes(bytes(data))
        with pytest.raises(DataError, match="cannot be read as text|not a cellray vocabulary"):
            read_gene_list(tmp_path / name)


def test_a_vocabulary_of_ours_is_read_with_its_specials(tmp_path):
    Vocab.from_genes(["A", "B"], ["a", "b"], specials=["<pad>"]).save(tmp_path / "v.json.gz")
    assert read_gene_list(tmp_path / "v.json.gz").tokens == {"<pad>": 0, "A": 1, "B": 2}


@pytest.mark.parametrize(
    ("raw", "pattern"),
    [
        (["A"], "holds list, not a dictionary"),
        ({"A": "x"}, "no dictionary of numbers"),
        (5, "int"),
    ],
)
def test_medians_are_numbers(tmp_path, raw, pattern):
    with pytest.raises(DataError, match=pattern):
        read_medians(write(tmp_path / "m.pkl", raw), allow_code=False)
    with pytest.raises(DataError, match="not a dictionary symbol -> id"):
        read_symbols(write(tmp_path / "s.pkl", ["A"]), allow_code=False)


def test_generations_are_read_from_names():
    assert generation("a/token_dictionary_gc104M.pkl") == "gc104M"
    assert generation("gc30m/token_dictionary.pkl") == ""


# ------------------------------------------------------------------ class names
@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("l.txt", "T\n\nB\nNK\n"),
        ("l.json", ["T", "B", "NK"]),
        ("l.json", {"0": "T", "2": "NK", "1": "B"}),
        ("l.json", {"T": 0, "NK": 2, "B": 1}),
        ("l.pkl", np.array(["T", "B", "NK"], dtype=object)),
        ("label_dict", np.array(["T", "B", "NK"])),
        ("l.csv", ",celltype\n0,T\n1,B\n2,NK\n"),
        ("l.tsv", "code\tname\n1\tB\n0\tT\n2\tNK\n"),
        ("l.csv", "T\nB\nNK\n"),
    ],
)
def test_class_names_in_every_form(tmp_path, name, raw):
    assert read_labels(write(tmp_path / name, raw)) == ("T", "B", "NK")


@pytest.mark.parametrize(
    ("name", "raw", "pattern"),
    [
        ("l.json", {"0": "a", "1": "b", "7": "c"}, "numbers its 3 classes 0, 1, 7; .* 0 .. 2"),
        ("l.json", {"a": 0, "b": 0}, "numbers its 2 classes 0, 0"),
        ("l.json", {"a": "x"}, "no dictionary of number -> class name"),
        ("l.json", 4, "holds int, not class names"),
        ("l.json", [0, 1], "holds 0, 1, ...; class names are words"),
        ("label", np.array([2, 0, 1]), "scBERT writes them to 'label_dict'"),
        ("l.csv", "a,b,c\n1,2,3\n", "no table of two columns"),
    ],
)
def test_what_are_no_class_names_is_refused(tmp_path, name, raw, pattern):
    with pytest.raises(DataError, match=pattern):
        read_labels(write(tmp_path / name, raw))


def test_broken_json_of_class_names_is_refused(tmp_path):
    (tmp_path / "l.json").write_text("[1,")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        read_labels(tmp_path / "l.json")
