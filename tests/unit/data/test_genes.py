import gzip
from importlib import resources

import numpy as np
import pandas as pd
import pytest

from cellray.core.errors import DataError
from cellray.data.genes import detect_organism, gene_table, map_genes


def frame(index, **columns):
    return pd.DataFrame(columns, index=pd.Index(index, dtype=object))


def test_shipped_tables_are_small_and_reproducible():
    folder = resources.files("cellray.data").joinpath("genes")
    files = [folder.joinpath(f"{o}.tsv.gz").read_bytes() for o in ("human", "mouse")]
    assert sum(map(len, files)) < 1_200_000
    for data in files:
        assert data[4:8] == b"\0\0\0\0"  # the gzip header's time
        lines = gzip.decompress(data).decode().splitlines()
        assert lines == sorted(lines)
    assert (len(gene_table("human").symbols), len(gene_table("mouse").symbols)) == (78894, 78317)


def test_ambiguous_symbols_are_not_mapped():
    human = gene_table("human")
    assert human.ids["TP53"] == "ENSG00000141510"
    assert "Y_RNA" not in human.ids
    mapping = map_genes(frame(["Y_RNA", "TP53"]), organism="human")
    assert mapping.feature_ids == ("Y_RNA", "ENSG00000141510")
    assert mapping.num_ensembl == 1


def test_unknown_table_names_the_allowed_ones():
    with pytest.raises(DataError, match=r"'humen'. Did you mean 'human'\? Allowed: human, mouse"):
        gene_table("humen")


def test_versions_are_stripped_and_par_y_is_kept():
    index = ["ENSG00000141510.18", "ENSG00000182378.14_PAR_Y", "ENSG00000182378.14"]
    mapping = map_genes(frame(index))
    assert mapping.feature_ids == (
        "ENSG00000141510",
        "ENSG00000182378_PAR_Y",
        "ENSG00000182378",
    )
    assert mapping.feature_names == ("TP53", "PLCXD1", "PLCXD1")
    assert mapping.organism == "human"


def test_ensembl_and_symbol_files_name_the_same_gene():
    by_id = map_genes(frame(["ENSG00000141510.2", "ENSG00000254647"]))
    by_symbol = map_genes(frame(["INS", "TP53"]), organism="human")
    by_column = map_genes(
        frame(["old1", "old2"], ensembl_id=["ENSG00000141510", "ENSG00000254647"])
    )
    assert set(by_id.feature_ids) == set(by_symbol.feature_ids) == set(by_column.feature_ids)


def test_blank_annotations_fall_back_to_the_symbol():
    var = frame(["TP53", "RP11-1.1", "EGFR"], ensembl_id=["ENSG00000141510", "", None])
    mapping = map_genes(var, organism="human")
    assert mapping.feature_ids == ("ENSG00000141510", "RP11-1.1", "ENSG00000146648")
    assert mapping.feature_names == ("TP53", "RP11-1.1", "EGFR")


def test_names_are_gencodes_whatever_the_file_says():
    var = frame(["ENSG00000141510", "ENSG99999999999"], gene_symbol=["P53", "MYOWN"])
    assert map_genes(var).feature_names == ("TP53", "MYOWN")


def test_two_rows_of_one_gene_are_reported_not_refused():
    var = frame(["CCL3L3", "CCL3L1"], ensembl_id=["ENSG00000276085", "ENSG00000276085"])
    mapping = map_genes(var, organism="human")
    assert mapping.feature_ids == ("ENSG00000276085",) * 2
    assert mapping.merged == {"ENSG00000276085": ("CCL3L3", "CCL3L1")}


@pytest.mark.parametrize("index", [["TP53", "EGFR", "TP53"], ["ENSG00000141510.1"] * 2])
def test_primary_ids_that_repeat_are_refused(index):
    with pytest.raises(DataError, match=r"occur more than once in var's index .*'(TP53|ENSG\d+)'"):
        map_genes(frame(index), organism="human")


def test_ids_that_repeat_only_without_version_are_refused_or_summed():
    var = frame(["ENSG00000141510.1", "ENSG00000141510.2"])
    with pytest.raises(DataError, match="set ingest.duplicate_genes = 'sum'"):
        map_genes(var)
    mapping = map_genes(var, sum_duplicates=True)
    assert mapping.feature_ids == ("ENSG00000141510",) * 2


def test_a_counter_index_takes_the_id_column():
    ids = ["ENSG00000141510.3", "ENSG00000146648"]
    mapping = map_genes(frame(["0", "1"], gene_ids=ids, gene_symbol=["TP53", "EGFR"]))
    assert mapping.feature_ids == ("ENSG00000141510", "ENSG00000146648")
    with pytest.raises(DataError, match="more than once in var's gene id column"):
        map_genes(frame(["0", "1"], gene_ids=[ids[0], ids[0]]))


def test_a_counter_index_takes_the_symbols_if_there_is_no_id_column():
    mapping = map_genes(frame(["0", "1"], gene_symbol=["TP53", "EGFR"]), organism="human")
    assert mapping.feature_ids == ("ENSG00000141510", "ENSG00000146648")


def test_a_counter_index_without_names_is_refused():
    with pytest.raises(DataError, match=r"only 0 .. n-1 and no column names the genes.*: weight"):
        map_genes(frame(["0", "1"], weight=[1.0, 2.0]))


def test_the_named_id_column_is_preferred():
    var = frame(["a", "b"], accession=["ENSG00000141510.4", "mine"])
    assert map_genes(var, id_column="accession").feature_ids == ("ENSG00000141510", "mine")
    with pytest.raises(DataError, match=r"'acession' is not in var. Did you mean 'accession'\?"):
        map_genes(var, id_column="acession")


def test_empty_ids_are_refused():
    with pytest.raises(DataError, match="1 genes have an empty id in var's index"):
        map_genes(frame(["TP53", ""]), organism="human")


def test_organism_is_found_by_prefix_then_statement_then_symbols():
    assert detect_organism(["ENSMUSG00000064842", "x"], ["qq1", "qq2"]) == ""
    assert detect_organism(["ENSMUSG00000064842"], ["a"], ["Homo sapiens"]) == "mouse"
    assert detect_organism(["a"], ["a"], ["NCBITaxon:10090"]) == "mouse"
    assert detect_organism(["TP53", "INS"], ["TP53", "INS"]) == "human"
    assert detect_organism(["Trp53", "Ins2"], ["Trp53", "Ins2"]) == "mouse"
    assert detect_organism(["1-100-200"], ["1-100-200"]) == ""


def test_the_real_symbol_files_are_mostly_mapped(cellray_data):
    import anndata as ad

    adata = ad.read_h5ad(cellray_data / "cells" / "pbmc3k_1000cells.h5ad", backed="r")
    mapping = map_genes(adata.var)
    adata.file.close()
    assert mapping.organism == "human"
    assert mapping.merged == {"ENSG00000276085": ("CCL3L3", "CCL3L1")}
    assert mapping.num_ensembl / len(mapping.feature_ids) > 0.85
    assert len(np.unique(mapping.feature_ids)) == len(mapping.feature_ids) - 1
