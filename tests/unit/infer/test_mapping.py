"""The mapping job: made once, used again, refused when it does not fit; resumable; scored."""

from __future__ import annotations

import shutil

import anndata as ad
import numpy as np
import pytest

import cellray
from cellray.cli import main
from cellray.core.errors import CheckpointError, ConfigError, DataError
from cellray.data.ingest import IngestConfig, ingest
from cellray.infer import mapping
from cellray.infer.mapping import check_map, embed_once, map_cells
from cellray.infer.reference import Reference, partial_of
from cellray.runs import build_run
from cellray.train.prepare import select_cells


@pytest.fixture(scope="module")
def stores(tmp_path_factory, make_cells):
    """A reference of two donors and queries of a third, as stores; the queries as a file too."""
    folder = tmp_path_factory.mktemp("stores")
    reference = make_cells(120)
    reference.obs["cell_type"] = reference.obs["cell_type"].where(np.arange(120) % 40 != 0)
    queries = make_cells(45, donors=("d3",), seed=5)
    queries.obs["cell_type"] = queries.obs["cell_type"].replace("type2", "type9")
    for name, cells in (("reference", reference), ("queries", queries)):
        cells.write_h5ad(folder / f"{name}.h5ad")
        ingest(IngestConfig(files=[str(folder / f"{name}.h5ad")], uri=str(folder / name)))
    return folder


def run_of(stores, model_folder, out, **keys):
    raw = {
        "name": "map",
        "model": str(model_folder),
        "output": str(out / "mapped.h5ad"),
        "reference": {"folder": str(out / "ref"), "data": {"uri": str(stores / "reference")}},
        "query": {"h5ad": str(stores / "queries.h5ad")},
    }
    for key, value in keys.items():
        raw[key] = {**raw[key], **value} if isinstance(raw.get(key), dict) else value
    return build_run("map", raw)


def tell(lines):
    return lambda line: lines.append(line)


def test_a_file_is_mapped_and_scored(stores, model_folder, tmp_path):
    said = []
    result = map_cells(run_of(stores, model_folder, tmp_path), tell(said))
    assert (result.num_cells, result.num_reference, result.reused) == (45, 117, False)
    found = ad.read_h5ad(result.path)
    original = ad.read_h5ad(stores / "queries.h5ad")
    np.testing.assert_array_equal(found.X, original.X)
    assert found.obs_names.tolist() == original.obs_names.tolist()
    model = cellray.load(str(model_folder))
    np.testing.assert_allclose(found.obsm["X_cellray"], model.embed(original), atol=1e-6)
    right = (found.obs["cellray_label"].astype(str) == original.obs["cell_type"].astype(str)).mean()
    assert result.scores["accuracy.v1"] == pytest.approx(right)
    assert 0.4 < right <= 2 / 3
    assert (result.scores["n_unseen_classes"], result.scores["n_unseen_cells"]) == (1, 15)
    assert any("3 reference cells have no 'cell_type' and are left out" in line for line in said)
    assert any("reference 117/117 cells" in line and "ETA 0 s" in line for line in said)
    told = "\n".join(result.lines())
    assert "117 cells, made" in told
    assert "1 classes that the reference lacks: 15 of 45, all counted as wrong" in told
    assert found.uns["cellray"]["k"] == 10


def test_a_store_gives_the_same_answers_as_its_file(stores, model_folder, tmp_path):
    by_file = map_cells(run_of(stores, model_folder, tmp_path), tell([]))
    query = {"h5ad": "", "data": {"uri": str(stores / "queries")}}
    output = str(tmp_path / "other.h5ad")
    by_store = map_cells(
        run_of(stores, model_folder, tmp_path, query=query, output=output), tell([])
    )
    assert by_store.reused
    assert by_store.scores == pytest.approx(by_file.scores)
    one, other = ad.read_h5ad(by_file.path).obs, ad.read_h5ad(by_store.path).obs
    assert one["cellray_label"].tolist() == other["cellray_label"].tolist()


def test_the_reference_is_embedded_once(stores, model_folder, tmp_path, monkeypatch):
    map_cells(run_of(stores, model_folder, tmp_path), tell([]))

    def again(*args, **kwargs):
        raise AssertionError("embedded again")

    monkeypatch.setattr(mapping, "embed_once", again)
    said = []
    result = map_cells(run_of(stores, model_folder, tmp_path, unknown_below=1.0), tell(said))
    assert result.reused
    assert result.num_unassigned == sum(
        ad.read_h5ad(result.path).obs["cellray_label"] == "Unassigned"
    )
    assert "used again" in result.lines()[0]
    raw = run_of(stores, model_folder, tmp_path, reference={"data": None})
    assert map_cells(raw, tell([])).reused  # the store of the reference is not needed any more


def test_other_cells_labels_and_models_are_refused(stores, model_folder, tmp_path):
    map_cells(run_of(stores, model_folder, tmp_path), tell([]))
    fewer = {"data": {"uri": str(stores / "reference"), "obs_filter": "donor == 'd1'"}}
    with pytest.raises(DataError, match=r"made of other cells \(117, .* selects \(57, .*remove"):
        map_cells(run_of(stores, model_folder, tmp_path, reference=fewer), tell([]))
    with pytest.raises(DataError, match="holds 'cell_type', the run asks for 'donor'"):
        map_cells(run_of(stores, model_folder, tmp_path, reference={"label": "donor"}), tell([]))
    relabelled = Reference.load(tmp_path / "ref")
    labels = relabelled.labels.copy()
    labels[:2] = "other"
    model = cellray.load(str(model_folder))
    shutil.rmtree(tmp_path / "ref")
    Reference.build(
        np.array(relabelled.embedding), labels, model=model, cells_sha256=relabelled.cells_sha256
    ).save(tmp_path / "ref")
    with pytest.raises(DataError, match="labels of 2 cells of the reference .* differ from"):
        map_cells(run_of(stores, model_folder, tmp_path), tell([]))
    shutil.rmtree(tmp_path / "ref")
    next(iter(model.backbone.parameters())).data += 1
    Reference.build(np.array(relabelled.embedding), labels, model=model).save(tmp_path / "ref")
    with pytest.raises(CheckpointError, match="its weights is"):
        check_map(run_of(stores, model_folder, tmp_path))


def test_an_interrupted_embedding_goes_on_where_it_stopped(
    stores, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(mapping, "_BLOCK_CELLS", 50)
    run = run_of(stores, model_folder, tmp_path)
    model = cellray.load(str(model_folder))
    cells = select_cells(run.reference.data, ["cell_type"])
    whole = embed_once(
        model, cells, tmp_path / "whole", cells_sha256="a", cells_micro=64, say=tell([])
    )
    embed, calls = mapping.embed_cells, []

    def second_fails(*args, **kwargs):
        calls.append(len(args[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embed(*args, **kwargs)

    def attempt(sha, said):
        return embed_once(
            model, cells, tmp_path / "ref", cells_sha256=sha, cells_micro=64, say=tell(said)
        )

    monkeypatch.setattr(mapping, "embed_cells", second_fails)
    with pytest.raises(KeyboardInterrupt):
        attempt("a", [])
    assert not (tmp_path / "ref").exists()
    said = []
    found = attempt("a", said)
    assert calls == [50, 50, 50, 20]
    assert "50 of 120 reference cells were embedded before; going on" in said
    np.testing.assert_array_equal(found, whole)
    attempt("other cells", [])
    assert calls[4:] == [50, 50, 20]
    assert partial_of(tmp_path / "ref").is_dir()


def test_donors_and_cells_on_both_sides_are_told(stores, model_folder, tmp_path):
    said = []
    query = {"h5ad": str(stores / "reference.h5ad")}
    map_cells(run_of(stores, model_folder, tmp_path, query=query), tell(said))
    told = "\n".join(said)
    assert "2 values of 'donor' are both in the reference and among the queries (d1, d2)" in told
    assert "query cells lie exactly on a reference cell: are they in it?" in told


def test_queries_without_labels_are_not_scored(stores, model_folder, tmp_path):
    bare = ad.read_h5ad(stores / "queries.h5ad")
    del bare.obs["cell_type"]
    bare.write_h5ad(tmp_path / "bare.h5ad")
    query = {"h5ad": str(tmp_path / "bare.h5ad")}
    result = map_cells(run_of(stores, model_folder, tmp_path, query=query), tell([]))
    assert result.scores == {}
    assert not any("accuracy" in line for line in result.lines())
    wrong = query | {"label": "cell_typ"}
    with pytest.raises(ConfigError, match="query.label = 'cell_typ' is no obs column of the quer"):
        map_cells(run_of(stores, model_folder, tmp_path, query=wrong), tell([]))


def test_a_query_without_counts_gets_no_label(stores, model_folder, tmp_path):
    cells = ad.read_h5ad(stores / "queries.h5ad")
    whole = map_cells(run_of(stores, model_folder, tmp_path), tell([]))
    before = ad.read_h5ad(whole.path).obs
    counts = cells.X.toarray() if hasattr(cells.X, "toarray") else np.asarray(cells.X).copy()
    counts[4] = 0
    cells.X = counts
    cells.write_h5ad(tmp_path / "empty.h5ad")
    query = {"h5ad": str(tmp_path / "empty.h5ad")}
    said = []
    found = map_cells(run_of(stores, model_folder, tmp_path, query=query), tell(said))
    assert "1 of 45 cells have no counts of the model's genes" in "\n".join(said)
    after = ad.read_h5ad(found.path).obs
    assert after["cellray_label"].iloc[4] == "Unassigned"
    assert after["cellray_confidence"].iloc[4] == 0
    rest = np.arange(45) != 4
    assert after["cellray_label"][rest].tolist() == before["cellray_label"][rest].tolist()
    ingest(IngestConfig(files=[str(tmp_path / "empty.h5ad")], uri=str(tmp_path / "empty")))
    query = {"h5ad": "", "data": {"uri": str(tmp_path / "empty")}}
    said = []
    found = map_cells(run_of(stores, model_folder, tmp_path, query=query), tell(said))
    assert "1 of 45 cells have no counts of the model's genes" in "\n".join(said)
    stored = ad.read_h5ad(found.path).obs
    assert stored["cellray_label"].tolist() == after["cellray_label"].tolist()
    assert stored["cellray_confidence"].iloc[4] == 0


def test_the_query_file_is_not_written_over(stores, model_folder, tmp_path):
    file = tmp_path / "mapped.h5ad"
    file.write_bytes((stores / "queries.h5ad").read_bytes())
    before = file.read_bytes()
    run = run_of(stores, model_folder, tmp_path, query={"h5ad": str(file)})
    for work in (lambda: map_cells(run, tell([])), lambda: check_map(run)):
        with pytest.raises(ConfigError, match="mapped.h5ad' is the query file; name another"):
            work()
    assert file.read_bytes() == before


def test_check_embeds_nothing_and_tells_what_there_is(stores, model_folder, tmp_path):
    lines = check_map(run_of(stores, model_folder, tmp_path))
    assert "117 cells to embed, 3 without 'cell_type' left out" in lines[1]
    assert lines[2].startswith("queries: 45 cells of")
    assert not any(tmp_path.iterdir())
    query = {"h5ad": "", "data": {"uri": str(stores / "queries")}}
    assert (
        "queries: 45 cells of" in check_map(run_of(stores, model_folder, tmp_path, query=query))[2]
    )


def test_check_reads_the_queries_of_a_file(stores, model_folder, tmp_path):
    cells = ad.read_h5ad(stores / "queries.h5ad")
    query = {"label": "cell_typ"}
    with pytest.raises(ConfigError, match="query.label = 'cell_typ' is no obs column of the quer"):
        check_map(run_of(stores, model_folder, tmp_path, query=query))
    few = cells[:, : cells.n_vars - 1].copy()
    few.X = few.X * 0.5
    few.write_h5ad(tmp_path / "scaled.h5ad")
    query = {"h5ad": str(tmp_path / "scaled.h5ad")}
    with pytest.raises(DataError, match="raw counts"):
        check_map(run_of(stores, model_folder, tmp_path, query=query))
    cells.var_names = [f"other{i}" for i in range(cells.n_vars)]
    cells.var = cells.var[[]]
    cells.write_h5ad(tmp_path / "foreign.h5ad")
    query = {"h5ad": str(tmp_path / "foreign.h5ad")}
    with pytest.raises(DataError, match="gene"):
        check_map(run_of(stores, model_folder, tmp_path, query=query))


def test_what_a_run_lacks_is_refused(stores, model_folder, tmp_path):
    with pytest.raises(ConfigError, match="no reference at .*, and no .reference.data. to make"):
        check_map(run_of(stores, model_folder, tmp_path, reference={"data": None}))
    with pytest.raises(DataError, match="reference.label = 'kind' is no obs column"):
        check_map(run_of(stores, model_folder, tmp_path, reference={"label": "kind"}))
    with pytest.raises(ConfigError, match="either .query.data. .* or query.h5ad .*, not neither"):
        run_of(stores, model_folder, tmp_path, query={"h5ad": ""})
    query = {"h5ad": "", "data": {"uri": "x"}, "layer": "counts"}
    with pytest.raises(ConfigError, match="query.layer goes with query.h5ad"):
        run_of(stores, model_folder, tmp_path, query=query)
    with pytest.raises(DataError, match="no file at"):
        map_cells(
            run_of(stores, model_folder, tmp_path, query={"h5ad": str(tmp_path / "none.h5ad")}),
            tell([]),
        )


def test_a_store_without_a_single_label_is_refused(stores, model_folder, tmp_path, make_cells):
    cells = make_cells(12)
    cells.obs["cell_type"] = np.array([None] * 11 + ["x"], dtype=object)
    cells.write_h5ad(tmp_path / "bare.h5ad")
    ingest(IngestConfig(files=[str(tmp_path / "bare.h5ad")], uri=str(tmp_path / "bare")))
    data = {"uri": str(tmp_path / "bare"), "obs_filter": "soma_joinid < 11"}
    with pytest.raises(DataError, match="no cell of the reference has a 'cell_type'"):
        check_map(run_of(stores, model_folder, tmp_path, reference={"data": data}))


def test_the_command_line_maps(stores, model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.toml").write_text(
        f'name = "m"\nmodel = "{model_folder}"\noutput = "out/mapped.h5ad"\n'
        f'[reference]\nfolder = "ref"\n[reference.data]\nuri = "{stores / "reference"}"\n'
        f'[query]\nh5ad = "{stores / "queries.h5ad"}"\n'
    )
    assert main(["map", "map.toml", "--check"]) == 0
    assert "117 cells to embed" in capsys.readouterr().out
    assert main(["map", "map.toml", "unknown_below=0.4"]) == 0
    assert "query macro_f1.union.v1: " in capsys.readouterr().out
    assert (tmp_path / "out" / "mapped.h5ad").is_file()
    assert main(["map", "map.toml", "output=x.txt"]) == 1
    assert "output" in capsys.readouterr().err
