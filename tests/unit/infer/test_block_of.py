"""Cells of an AnnData over a model's genes: matched, ordered, refused with the reason."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import DataError
from cellray.data.vocab import Vocab
from cellray.infer.load import block_of

IDS = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
VOCAB = Vocab.from_genes(IDS, ["A", "B", "C"], specials=("<pad>",))


def cells(counts, names, **columns):
    return ad.AnnData(np.array(counts, dtype=np.float32), var=pd.DataFrame(columns, index=names))


def test_genes_are_put_in_the_vocabularys_order_and_library_sizes_count_all():
    block = block_of(cells([[5, 0, 7, 2], [0, 0, 3, 4]], [IDS[2], "x", IDS[0], "y"]), VOCAB)
    assert block.indptr.tolist() == [0, 2, 3]
    assert block.genes.tolist() == [0, 2, 0]
    assert block.counts.tolist() == [7, 5, 3]
    assert block.library_sizes.tolist() == [14, 7]


def test_the_column_that_matches_most_genes_is_taken():
    found = cells([[1, 2, 3]], ["g1", "g2", "g3"], ensembl_id=[IDS[1], "", IDS[0]])
    assert block_of(found, VOCAB).genes.tolist() == [0, 1]
    assert block_of(cells([[1, 2, 3]], ["C", "B", "q"]), VOCAB).genes.tolist() == [1, 2]


def test_repeated_genes_are_refused():
    with pytest.raises(DataError, match=r"1 genes occur more than once .*ENSG00000000001"):
        block_of(cells([[3, 4, 0]], [f"{IDS[0]}.1", f"{IDS[0]}.2", IDS[1]]), VOCAB)


def test_cells_that_express_none_of_the_genes_are_refused():
    with pytest.raises(DataError, match="none of the counts lie on the 1 genes shared"):
        block_of(cells([[0, 4]], [IDS[0], "mouse"]), VOCAB)


def test_layers_and_types():
    with pytest.raises(DataError, match="no layer 'countz'; there are: none"):
        block_of(cells([[1]], [IDS[0]]), VOCAB, layer="countz")
    with pytest.raises(DataError, match="cells are given as str; give an AnnData"):
        block_of("x", VOCAB)
    empty = ad.AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=IDS))
    with pytest.raises(DataError, match="X is empty"):
        block_of(empty, VOCAB)
