"""A reference on the disk: what it answers, what it keeps, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier

import cellray
from cellray.core.errors import CheckpointError, DataError
from cellray.infer.import_weights import import_weights
from cellray.infer.reference import Origin, Reference
from helpers_upstream import scgpt_folder, scgpt_weights

RNG = np.random.default_rng(3)
VECTORS = RNG.normal(size=(200, 8)).astype(np.float32)
LABELS = np.array([f"t{i}" for i in RNG.integers(0, 4, 200)], dtype=object)
QUERIES = RNG.normal(size=(50, 8)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_labels_agree_with_scikit_learn_where_there_is_no_tie(k):
    found = Reference.build(VECTORS, LABELS).map(QUERIES, k=k)
    other = KNeighborsClassifier(n_neighbors=k).fit(VECTORS, LABELS)
    shares = other.predict_proba(QUERIES)
    tied = (shares == shares.max(1, keepdims=True)).sum(1) > 1
    assert (~tied).sum() > 20
    assert (found["label"].to_numpy() == other.predict(QUERIES))[~tied].all()
    np.testing.assert_allclose(found["confidence"], shares.max(1), atol=1e-12)
    np.testing.assert_allclose(found["distance"], other.kneighbors(QUERIES, 1)[0][:, 0], rtol=1e-6)


def test_a_tie_goes_to_the_nearest_and_few_cells_all_vote():
    reference = Reference.build([[0.0], [1.0], [5.0]], ["a", "b", "c"])
    found = reference.map(np.array([[0.9], [4.0]]), k=10)
    assert found["label"].tolist() == ["b", "c"]
    np.testing.assert_allclose(found["confidence"], [1 / 3, 1 / 3])
    assert reference.map(np.zeros((0, 1)), k=2).shape == (0, 3)


def test_neighbours_that_agree_too_little_leave_a_cell_unassigned():
    reference = Reference.build(VECTORS, LABELS)
    sure, plain = reference.map(QUERIES, unknown_below=0.5), reference.map(QUERIES)
    low = (plain["confidence"] < 0.5).to_numpy()
    assert 0 < low.sum() < len(low)
    assert (sure["label"][low] == "Unassigned").all()
    assert (sure["label"][~low] == plain["label"][~low]).all()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    obs = pd.DataFrame({"donor": ["a", "b"] * 100, "age": np.arange(200)})
    made = Reference.build(VECTORS, LABELS, obs=obs, label="kind", cells_sha256="abc")
    made.save(tmp_path / "ref")
    found = Reference.load(tmp_path / "ref")
    assert isinstance(found.embedding, np.memmap)
    np.testing.assert_array_equal(found.embedding, VECTORS)
    assert found.labels.tolist() == LABELS.tolist()
    assert found.classes == ("t0", "t1", "t2", "t3")
    assert (found.label, found.cells_sha256) == ("kind", "abc")
    assert found.obs["donor"].tolist() == obs["donor"].tolist()
    assert found.obs["age"].tolist() == obs["age"].tolist()
    pd.testing.assert_frame_equal(found.map(QUERIES), made.map(QUERIES))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ref"]
    with pytest.raises(DataError, match="something at .*ref' already; remove it or name another"):
        made.save(tmp_path / "ref")


def test_what_cannot_be_a_reference_is_refused():
    with pytest.raises(DataError, match=r"needs \(cells, width\) vectors; given: \(200,\)"):
        Reference.build(VECTORS[:, 0], LABELS)
    with pytest.raises(DataError, match="200 embedded cells was given 199 labels and 200 rows"):
        Reference.build(VECTORS, LABELS[1:])
    missing = LABELS.copy()
    missing[4] = None
    with pytest.raises(DataError, match="1 of 200 reference cells have no 'cell_type'; leave"):
        Reference.build(VECTORS, missing)
    broken = VECTORS.copy()
    broken[7, 2] = np.nan
    with pytest.raises(DataError, match="embeddings of 1 of 200 reference cells are not finite"):
        Reference.build(broken, LABELS)


def test_queries_that_do_not_fit_are_refused():
    reference = Reference.build(VECTORS, LABELS)
    with pytest.raises(DataError, match=r"shape \(50, 7\) cannot be mapped .* of width 8"):
        reference.map(QUERIES[:, 1:])
    with pytest.raises(DataError, match="embeddings of 50 of 50 queries are not finite"):
        reference.map(QUERIES * np.inf)
    with pytest.raises(DataError, match="k = 0, unknown_below = 0: give k >= 1"):
        reference.map(QUERIES, k=0)


def test_cells_are_embedded_by_the_model_of_the_reference(model_folder, make_cells, tmp_path):
    model = cellray.load(str(model_folder))
    cells, queries = make_cells(90), make_cells(30, donors=("d3",), seed=1)
    made = Reference.build(model.embed(cells), cells.obs["cell_type"], model=model, obs=cells.obs)
    made.save(tmp_path / "ref")
    found = Reference.load(tmp_path / "ref")
    mapped = found.map(queries)
    assert mapped.index.tolist() == queries.obs_names.tolist()
    assert (mapped["label"].to_numpy() == queries.obs["cell_type"].to_numpy()).mean() > 0.6
    pd.testing.assert_frame_equal(mapped, found.map(queries, model=model))
    plain = Reference.build(VECTORS, LABELS)
    with pytest.raises(CheckpointError, match="an embedding that no model is known of; map"):
        plain.map(queries)


def test_another_model_is_refused_whatever_differs(model_folder, make_cells, tmp_path):
    model = cellray.load(str(model_folder))
    cells = make_cells(30)
    Reference.build(model.embed(cells), cells.obs["cell_type"], model=model).save(tmp_path / "ref")
    assert Reference.load(tmp_path / "ref", model).classes == ("type0", "type1", "type2")

    other = cellray.load(str(model_folder))
    with_other = next(iter(other.backbone.parameters()))
    with_other.data += 1.0
    message = r"made with another model .*: its weights is \w{12}, that of .* \w{12}; map with"
    with pytest.raises(CheckpointError, match=message):
        Reference.load(tmp_path / "ref", other)
    with pytest.raises(CheckpointError, match="weights"):
        Reference.load(tmp_path / "ref").map(cells, model=other)

    manifest = model.manifest
    tokens = dataclasses.replace(manifest, tokenizer={**manifest.tokenizer, "num_bins": 7})
    changed = dataclasses.replace(model, manifest=tokens)
    with pytest.raises(CheckpointError, match="settings of 'tokenizer' .*num_bins = 51 there, 7"):
        Reference.load(tmp_path / "ref", changed)
    genes = dataclasses.replace(manifest, vocab_fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="its gene space is"):
        Reference.load(tmp_path / "ref", dataclasses.replace(model, manifest=genes))


def test_weights_that_changed_in_their_place_are_noticed(model_folder, make_cells, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    model = cellray.load(str(tmp_path / "model"))
    cells = make_cells(30)
    Reference.build(model.embed(cells), cells.obs["cell_type"], model=model).save(tmp_path / "ref")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "weights.safetensors"
    weights = load_file(file)
    name = sorted(weights)[0]
    save_file({**weights, name: weights[name] + 1}, file)
    with pytest.raises(CheckpointError, match="weights"):
        Reference.load(tmp_path / "ref").map(cells)


def test_missing_and_damaged_references_say_so(tmp_path):
    Reference.build(VECTORS, LABELS).save(tmp_path / "ref")
    with pytest.raises(DataError, match="no reference at .*reff'. Did you mean 'ref'"):
        Reference.load(tmp_path / "reff")
    facts = json.loads((tmp_path / "ref" / "reference.json").read_text())
    for change, message in [
        ({"format": "x"}, "has format 'x', not 'cellray.reference.v1'"),
        ({"cells": 7}, r"7 cells x 8 are promised, the embedding is \(200, 8\)"),
        ({"origin": {"what": 1}}, "is damaged"),
    ]:
        (tmp_path / "ref" / "reference.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(DataError, match=message):
            Reference.load(tmp_path / "ref")
    (tmp_path / "ref" / "reference.json").write_text(json.dumps(facts))
    changed = VECTORS.copy()
    changed[0, 0] += 1
    np.save(tmp_path / "ref" / "embedding.npy", changed)
    with pytest.raises(DataError, match="was made of other cells"):
        Reference.load(tmp_path / "ref").map(QUERIES)
    (tmp_path / "ref" / "embedding.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match="the reference .* is damaged"):
        Reference.load(tmp_path / "ref")


def test_the_classifier_on_top_of_a_model_plays_no_part(tmp_path):
    weights = scgpt_weights(classes=3)
    body = {name: value for name, value in weights.items() if not name.startswith("cls_decoder")}
    assert len(body) < len(weights)
    origins = []
    for name, part in (("whole", weights), ("body", body)):
        scgpt_folder(tmp_path / name, part)
        import_weights("scgpt", tmp_path / name, tmp_path / f"{name}-checkpoint")
        origins.append(Origin.of(cellray.load(str(tmp_path / f"{name}-checkpoint"))))
    assert origins[0].weights_sha256 == origins[1].weights_sha256
