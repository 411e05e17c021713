"""GMT files, and how sets are chosen for a vocabulary."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from cellray.core.errors import ConfigError, DataError
from cellray.data.gene_sets import choose_gene_sets, random_gene_sets, read_gmt
from cellray.data.gene_table import read_gene_table, read_vectors
from cellray.data.vocab import Vocab

CHOICE = {"max_listed": 6, "min_present": 2, "max_sets": 3, "unannotated": 1, "source": "x.gmt"}


def vocab() -> Vocab:
    ids = [f"ENSG{i:011d}" for i in range(8)]
    return Vocab.from_genes(ids, [f"S{i}" for i in range(8)], specials=("<pad>",))


def test_the_hallmark_sets_ship_with_the_package():
    sets = read_gmt("hallmark")
    assert len(sets) == 50
    assert sum(map(len, sets.values())) == 7324
    assert "TNFAIP3" in sets["HALLMARK_TNFA_SIGNALING_VIA_NFKB"]


def test_symbols_and_ids_are_found_and_sets_chosen_by_hand():
    sets = {
        "LONG": [f"S{i}" for i in range(7)],  # lists more than 6
        "A": ["S3", "S1", "S1", "NOPE"],
        "B": ["ENSG00000000002.7", "S5", "S6", "S7"],
        "ONE": ["S1", "X", "Y"],  # one gene in the data
        "C": ["S0", "S2", "S4"],
    }
    chosen = choose_gene_sets(sets, vocab(), **CHOICE)
    # the three largest of A (2), B (4), C (3) and node 0 (8), in the file's order
    assert chosen == {"B": (2, 5, 6, 7), "C": (0, 2, 4), "node 0": tuple(range(8))}
    more = choose_gene_sets(sets, vocab(), **{**CHOICE, "max_sets": 9, "unannotated": 0})
    assert list(more) == ["A", "B", "C"]
    assert more["A"] == (1, 3)


def test_sets_without_a_gene_in_the_data_say_what_both_sides_look_like():
    with pytest.raises(DataError, match="none of the 2 genes of 'x.gmt' .*Actb.*ENSG0.*S0"):
        choose_gene_sets({"A": ["Actb", "Gapdh"]}, vocab(), **CHOICE)
    with pytest.raises(DataError, match="no gene set of 'x.gmt' lists at most 6 genes"):
        choose_gene_sets({"A": ["S1"]}, vocab(), **CHOICE)


def test_sets_that_would_be_replaced_or_crowded_out_are_refused():
    sets = {"A": ["S1", "S2"], "node 0": ["S3", "S4"]}
    with pytest.raises(DataError, match="has a gene set 'node 0', the name of a set of all genes"):
        choose_gene_sets(sets, vocab(), **CHOICE)
    kept = choose_gene_sets(sets, vocab(), **{**CHOICE, "unannotated": 0})
    assert kept == {"A": (1, 2), "node 0": (3, 4)}
    with pytest.raises(DataError, match="model.max_sets = 1 leaves no room for gene sets"):
        choose_gene_sets({"A": ["S1", "S2"]}, vocab(), **{**CHOICE, "max_sets": 1})


def test_gmt_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no GMT file at 'hallmrk'. Did you mean 'hallmark'"):
        read_gmt("hallmrk")
    for text, message in (
        ("A\tx\n", "line 1 has 2 tab-separated words"),
        ("A\tx\tS1\nA\tx\tS2\n", "the gene set 'A' twice"),
        ("\n", "holds no gene set"),
    ):
        (tmp_path / "x.gmt").write_text(text)
        with pytest.raises(DataError, match=message):
            read_gmt(str(tmp_path / "x.gmt"))
    (tmp_path / "x.gmt.gz").write_bytes(gzip.compress(b"A\tx\tS1\tS2\n"))
    assert read_gmt(str(tmp_path / "x.gmt.gz")) == {"A": ["S1", "S2"]}
    long = "A\tx\t" + "\t".join(f"S{i * 7919 % 1009}" for i in range(200))
    torn = bytearray(gzip.compress(long.encode()))
    torn[40:60] = b"\x55" * 20
    for data in (b"no gzip", bytes(torn)):
        (tmp_path / "y.gmt.gz").write_bytes(data)
        with pytest.raises(DataError, match="cannot be read as GMT"):
            read_gmt(str(tmp_path / "y.gmt.gz"))
    (tmp_path / "z.gmt").write_bytes("\ufeffA\tx\tS1\n".encode())
    assert list(read_gmt(str(tmp_path / "z.gmt"))) == ["A"]  # without the byte order mark


def test_tosicas_reactome_file_gives_300_sets():
    folder = os.environ.get("CELLRAY_DATA")
    if not folder:
        pytest.skip("not run: CELLRAY_DATA is not set")
    sets = read_gmt(str(Path(folder) / "genes" / "tosica_reactome.gmt"))
    assert len(sets) == 674
    names = sorted({gene for genes in sets.values() for gene in genes})[:3000]
    genes = Vocab.from_genes(names, names, specials=("<pad>",))
    options = {"max_listed": 300, "min_present": 5, "max_sets": 300, "unannotated": 1}
    chosen = choose_gene_sets(sets, genes, **options, source="reactome")
    assert len(chosen) == 300
    assert list(chosen)[-1] == "node 0"
    assert min(map(len, chosen.values())) >= 5


def test_random_sets_are_the_same_for_the_same_seed():
    one = random_gene_sets(vocab(), num_sets=50, fraction=0.25, seed=1)
    assert one == random_gene_sets(vocab(), num_sets=50, fraction=0.25, seed=1)
    assert one != random_gene_sets(vocab(), num_sets=50, fraction=0.25, seed=2)
    assert 60 < sum(map(len, one.values())) < 140  # 400 places, a quarter of them


def test_gene_sets_travel_with_the_vocabulary(tmp_path):
    plain = vocab()
    with_sets = plain.with_gene_sets({"A": (1, 3), "B": (0,)})
    assert with_sets.fingerprint != plain.fingerprint
    with_sets.save(tmp_path / "v.json.gz")
    back = Vocab.load(tmp_path / "v.json.gz")
    assert back.gene_sets == {"A": (1, 3), "B": (0,)}
    assert back.fingerprint == with_sets.fingerprint


def test_gene_vectors_are_found_by_name_in_every_form(tmp_path):
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    names = ["S5", "S1", "OTHER"]
    (tmp_path / "a.txt").write_text("3 2\nS5 0 1\nS1 2 3\nOTHER 4 5\n")
    (tmp_path / "b.txt").write_text("S5\t0\t1\nS1\t2\t3\nOTHER\t4\t5\n")
    np.savez(tmp_path / "c.npz", genes=np.array(names), vectors=vectors)
    np.save(tmp_path / "d.npy", vectors)
    (tmp_path / "d.genes.txt").write_text("\n".join(names))
    for name in ("a.txt", "b.txt", "c.npz", "d.npy"):
        with pytest.warns(UserWarning, match="no vector for 6 of the 8 genes"):
            table = read_gene_table(tmp_path / name, vocab())
        assert table[5].tolist() == [0, 1]
        assert table[1].tolist() == [2, 3]
        assert not table[[0, 2, 3, 4, 6, 7]].any()


def test_gene_vectors_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match="no file of gene vectors at"):
        read_vectors(tmp_path / "none.txt")
    np.save(tmp_path / "d.npy", np.zeros((3, 2)))
    with pytest.raises(DataError, match=r"vectors without gene names; write .*d\.genes\.txt"):
        read_vectors(tmp_path / "d.npy")
    (tmp_path / "d.genes.txt").write_text("A\nB\n")
    with pytest.raises(DataError, match=r"shape \(3, 2\) for 2 gene names"):
        read_vectors(tmp_path / "d.npy")
    (tmp_path / "e.txt").write_text("A 1 2\nB 1\n")
    with pytest.raises(DataError, match="the same number of numbers"):
        read_vectors(tmp_path / "e.txt")
    (tmp_path / "f.txt").write_text("Actb 1 2\nGapdh 1 2\n")
    with pytest.raises(DataError, match="vectors of 2 genes .*none of them among the 8"):
        read_gene_table(tmp_path / "f.txt", vocab())
