"""UMAP: reproducible, keeps clusters apart; its picture is legible by construction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from matplotlib.image import imread

from cellray.bench import umap
from cellray.bench.umap import PALETTE, plot_umap, umap_embedding
from cellray.core.errors import DataError

# Linear RGB as protan and deutan eyes see it (Machado et al. 2009, doi:10.1109/TVCG.2009.113).
VISION = {
    "normal": np.eye(3),
    "protan": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deutan": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


def cie_lab(colours: tuple[str, ...], vision: str) -> npt.NDArray[np.float64]:
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ VISION[vision].T, 0, 1)
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = seen @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@pytest.mark.parametrize("vision", VISION)
def test_palette_is_told_apart_by_colour_blind_eyes(vision: str) -> None:
    """A CIELAB distance of about 2.3 is just noticeable; our 20 classes are at least 17 apart."""
    lab = cie_lab(PALETTE, vision)
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert len(PALETTE) == len(set(PALETTE)) == 20
    assert distance.min() > 17


def blobs() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    centres = np.eye(3, 8) * 20
    return (centres[labels] + rng.normal(size=(90, 8))).astype(np.float32), labels


def test_umap_is_reproducible_and_keeps_clusters_apart() -> None:
    vectors, labels = blobs()
    first = umap_embedding(vectors, seed=1)
    assert first.shape == (90, 2)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, umap_embedding(vectors, seed=1))
    assert (first != umap_embedding(vectors, seed=2)).any()
    distance = np.linalg.norm(first[:, None] - first[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).all()


def test_bad_embeddings_are_refused() -> None:
    vectors, _ = blobs()
    with pytest.raises(DataError, match=r"needs at least 4 cells .* the embedding is \(3, 8\)"):
        umap_embedding(vectors[:3], seed=0)
    vectors[4, 2] = np.nan
    with pytest.raises(DataError, match="the embeddings of 1 of 90 cells are not finite"):
        umap_embedding(vectors, seed=0)


def texts(values: list[str | None]) -> npt.NDArray[np.str_]:
    return umap._texts(np.array(values, dtype=object), len(values), "x")


def test_classes_are_coloured_by_size_with_missing_values_grey() -> None:
    panel = umap._colouring(texts(["b", "a", "b", None, "b", "a", "c"]), [])
    assert panel.names == ["b", "a", "c", "no value"]
    assert panel.colours == [*PALETTE[:3], "#BDBDBD"]
    assert panel.codes.tolist() == [0, 1, 0, 3, 0, 1, 2]
    assert panel.num_coloured == 3


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
def test_every_kind_of_missing_value_is_one_class(missing: object) -> None:
    panel = umap._colouring(umap._texts(["a", missing, "a"], 3, "x"), [])  # type: ignore[list-item]
    assert panel.names == ["a", "no value"]


@pytest.mark.parametrize("kind", ["few", "all alike", "islands"])
def test_odd_embeddings_are_laid_out_without_a_warning(kind: str) -> None:
    """Warnings are errors here: a start that UMAP cannot compute must not stop a benchmark."""
    rng = np.random.default_rng(0)
    vectors = {
        "few": rng.normal(size=(4, 3)),
        "all alike": np.ones((40, 5)),
        "islands": rng.normal(size=(90, 5)) + 1e4 * (np.arange(90) % 3)[:, None],
    }[kind]
    found = umap_embedding(vectors, seed=0)
    assert found.shape == (len(vectors), 2)
    assert np.isfinite(found).all()


def test_a_panel_of_predictions_shares_the_colours_of_the_truth() -> None:
    truth = umap._colouring(texts(["a", "a", "b", "c"]), [])
    predicted = umap._colouring(texts(["c", "c", "b", None]), [truth])
    assert predicted.names == ["a", "b", "c", "no value"]
    assert predicted.codes.tolist() == [2, 2, 1, 3]
    assert umap._colouring(texts(["d", "a", "a", "a"]), [truth]).names == ["a", "d"]


def test_more_than_twenty_classes_leave_the_smaller_ones_grey() -> None:
    values = [f"t{i:02d}" for i in range(26) for _ in range(40 - i)]
    panel = umap._colouring(texts([*values, None]), [])
    assert len(panel.names) == 20
    assert panel.names[-1] == "7 other classes or no value"
    assert panel.num_coloured == 19
    assert panel.codes[0] == 0
    assert panel.codes[-1] == panel.codes[-2] == 19
    again = umap._colouring(texts(["t25", "t00"]), [panel])
    assert again.codes.tolist() == [19, 0]


def test_picture_has_a_panel_for_each_colouring(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coords = rng.normal(size=(200, 2))
    labels = np.array([f"type {i % 9}" for i in range(200)])
    donors = np.array([f"d{i % 3}" for i in range(200)])
    one = plot_umap(coords, colours={"type": labels}, path=tmp_path / "one.png")
    two = plot_umap(
        coords, colours={"type": labels, "donor": donors}, path=tmp_path / "two.png", title="T"
    )
    first, second = imread(one), imread(two)
    assert second.shape[0] == first.shape[0] == 780
    assert second.shape[1] == 2 * first.shape[1] == 1980
    assert (first[:3, :3, :3] == 1).all()  # white, so that it prints
    shades = {tuple(np.round(c * 255).astype(int)) for c in first[:, :, :3].reshape(-1, 3)}
    assert (0x00, 0x72, 0xB2) in shades  # the legend's first marker, unblended


def test_the_same_picture_twice_is_the_same_file(tmp_path: Path) -> None:
    coords = np.random.default_rng(0).normal(size=(50, 2))
    files = [
        plot_umap(coords, colours={"x": ["a", "b"] * 25}, path=tmp_path / f"{i}.png")
        for i in range(2)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("coords", "colours", "message"),
    [
        (np.zeros((5, 3)), {"x": ["a"] * 5}, r"needs \(N, 2\) coordinates; these are \(5, 3\)"),
        (np.array([[0, np.nan], [1, 1]]), {"x": ["a"] * 2}, "of 1 of 2 cells are not finite"),
        (np.zeros((5, 2)), {}, "nothing to colour the picture by"),
        (np.zeros((5, 2)), {"type": ["a"] * 4}, "'type' has 4 labels but there are 5 cells"),
    ],
)
def test_pictures_that_cannot_be_drawn(
    coords: npt.NDArray[np.float64], colours: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        plot_umap(coords, colours=colours, path=tmp_path / "x.png")
