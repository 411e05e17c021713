"""The gene space: matching by id and symbol, fingerprints, files."""

import numpy as np
import pytest

from cellray.core.errors import DataError
from cellray.data.vocab import Vocab, strip_version

IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]


def make(**over):
    return Vocab.from_genes(IDS, ["A", "B", "B"], specials=("<pad>", "<mask>"), **over)


def test_specials_come_first():
    vocab = make()
    assert vocab.specials == {"<pad>": 0, "<mask>": 1}
    assert vocab.gene_tokens.tolist() == [2, 3, 4]
    assert vocab.num_tokens == 5
    assert vocab.pad == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ENSG00000141510.18", "ENSG00000141510"),
        ("ENSMUSG00000059552.7", "ENSMUSG00000059552"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("RP11-206L10.2", "RP11-206L10.2"),
        ("TP53", "TP53"),
    ],
)
def test_versions(given, expected):
    assert strip_version(given) == expected


def test_genes_match_in_any_order_with_version_and_by_unique_symbol():
    vocab = make()
    assert vocab.match([IDS[2], "nothing", f"{IDS[0]}.4"]).tolist() == [2, -1, 0]
    assert vocab.match(["x", "y"], ["A", "B"]).tolist() == [0, -1]  # B names two genes
    assert vocab.match(["x", "z"], ["A", "A"]).tolist() == [-1, -1]  # so does the file's A
    assert vocab.match([IDS[0], "x"], ["q", "A"]).tolist() == [0, -1]  # taken by its id


def test_medians_change_the_fingerprint_and_survive_a_file(tmp_path):
    vocab = make()
    with_medians = vocab.with_medians(np.array([0.5, 1, 2], dtype=np.float32))
    assert vocab.fingerprint != with_medians.fingerprint
    with_medians.save(tmp_path / "v.json.gz")
    read = Vocab.load(tmp_path / "v.json.gz")
    assert read.fingerprint == with_medians.fingerprint
    assert read.gene_ids == tuple(IDS)
    with_medians.save(tmp_path / "w.json.gz")
    assert (tmp_path / "v.json.gz").read_bytes() == (tmp_path / "w.json.gz").read_bytes()


def test_errors(tmp_path):
    with pytest.raises(DataError, match="gene ids occur twice in the vocabulary: a"):
        Vocab.from_genes(["a", "b", "a"], ["", "", ""], specials=())
    with pytest.raises(DataError, match="needs at least one gene"):
        Vocab.from_genes([], [], specials=())
    with pytest.raises(DataError, match=r"no special token '<cls>'; it has \['<mask>', '<pad>'\]"):
        make().special("<cls>")
    with pytest.raises(DataError, match=r"\(2,\) medians given for 3 genes"):
        make().with_medians(np.ones(2, dtype=np.float32))
    with pytest.raises(DataError, match="no vocabulary file at"):
        Vocab.load(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="is not a cellray vocabulary"):
        Vocab.load(tmp_path / "bad")


def test_some_genes_of_a_vocabulary_take_tokens_anew() -> None:
    whole = Vocab(
        gene_ids=("g0", "g1", "g2", "g3"),
        symbols=("A", "B", "C", "D"),
        gene_tokens=np.array([0, 1, 2, 3], dtype=np.int32),
        specials={"<pad>": 5, "<cls>": 4},
        medians=np.array([1, 2, 3, 4], dtype=np.float32),
        gene_sets={"low": (0, 1), "odd": (1, 3)},
        modalities=("RNA", "RNA", "ADT", "RNA"),
    )
    part, tokens = whole.only(np.array([1, 3]))
    assert part.gene_ids == ("g1", "g3")
    assert part.symbols == ("B", "D")
    assert part.specials == {"<cls>": 0, "<pad>": 1}
    assert part.gene_tokens.tolist() == [2, 3]
    assert tokens.tolist() == [4, 5, 1, 3]
    assert len(tokens) == part.num_tokens
    assert part.medians.tolist() == [2, 4]
    assert part.gene_sets == {"low": (0,), "odd": (0, 1)}
    assert part.modalities == ("RNA", "RNA")
