"""The tables of the README: all families beside all baselines, on real cells, five seeds.

``python tests/benchmarks/tables.py FOLDER [--only annotation ...] [--concurrent 2]`` with
``CELLRAY_DATA`` set. It ingests the sets, pretrains a small model of each family that can be
pretrained (cells of two pancreas donors and of a PBMC donor; none of the test cells), tunes the
learning rate of each fine-tuned row and of each row from scratch in as many trials as logistic
regression has strengths to choose from, and runs one benchmark a task. Everything is kept in
FOLDER, the tables as ``annotation.md`` and so on: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from cellray.cli import say
from cellray.core.section import merge, to_toml
from cellray.runs import build_run, run_job

HERE = Path(__file__).resolve().parent
PANCREAS = HERE.parent / "data" / "pancreas"
SEEDS = [0, 1, 2, 3, 4]
RATES = [5e-4, 1e-3, 2e-3, 5e-3]
DONORS = {"column": "donor", "test_values": ["human3"]}

# Small enough for five seeds on two CPU cores; each family's own tokens and objective.
SIZES: dict[str, dict[str, Any]] = {
    "scgpt": {
        "data": {"vocab_genes": 1200},
        "tokenizer": {"max_tokens": 200},
        "model": {"width": 64, "num_layers": 2, "num_heads": 4, "ffn_width": 64},
        "optim": {"lr": 2e-3},
    },
    "geneformer": {
        "data": {"vocab_genes": 1200},
        "tokenizer": {"max_tokens": 128},
        "model": {"width": 64, "num_layers": 2, "num_heads": 4, "ffn_width": 128},
        "optim": {"lr": 3e-3},
    },
    "scbert": {
        "data": {"vocab_genes": 600},
        "model": {
            "width": 64, "num_layers": 2, "num_heads": 4, "head_width": 16, "ffn_width": 128,
        },
        "optim": {"lr": 1e-3},
    },
    "scfoundation": {
        "data": {"vocab_genes": 1000},
        "tokenizer": {"max_tokens": 256},
        "model": {
            "width": 64, "num_layers": 2, "num_heads": 4, "ffn_width": 128,
            "decoder_width": 48, "decoder_layers": 1, "decoder_heads": 2,
            "decoder_head_width": 16, "decoder_ffn_width": 96, "value_bins": 20,
        },
        "optim": {"lr": 1e-3},
        "batch": {"packing": "packed"},
    },
}  # fmt: skip


def stores(folder: Path, cells: Path) -> dict[str, str]:
    """Ingest what is not there yet; name -> store."""
    files = {
        "corpus": [
            *(str(PANCREAS / f"human{i}.h5ad") for i in (1, 2)),
            str(cells / "pbmc_frozen_donorA.h5ad"),
            str(cells / "immune_celltypist_559.h5ad"),
        ],
        "pancreas": [str(PANCREAS / f"human{i}.h5ad") for i in (1, 2, 3)],
        "pbmc3k": [str(cells / "pbmc3k_1000cells.h5ad")],
        "kang": [str(cells / "kang_ifnb_muscat_labelled.h5ad")],
        "cellmix": [str(cells / "cellmix_sc_mixology.h5ad")],
    }
    for name, wanted in files.items():
        uri = str(folder / "stores" / name)
        if not Path(uri).is_dir():
            run_job(build_run("ingest", {"ingest": {"files": wanted, "uri": uri}}), say)
    return {name: str(folder / "stores" / name) for name in files}


def pretrained(folder: Path, uri: str, steps: int) -> dict[str, str]:
    """Pretrain each family; family -> checkpoint."""
    models = {}
    for family, sizes in SIZES.items():
        raw = {
            "name": f"pretrain-{family}",
            "seed": 7,
            "data": {"uri": uri, "min_genes_per_cell": 200, "split": {"validation_fraction": 0.05}},
            "model": {"family": family},
            "optim": {"warmup_steps": 20},
            "batch": {"cells_global": 16, "cells_micro": 16},
            "train": {"steps": steps, "log_every_steps": 50, "eval_every_steps": steps // 2},
            "engine": {"name": "torch"},
            "scale": {"workers": 1, "threads_per_worker": 1},
            "checkpoint": {"dir": str(folder), "every_steps": steps // 2},
        }
        models[family] = run_job(build_run("pretrain", merge(raw, sizes)), say).model_dir
    return models


def finetune_files(folder: Path, uri: str, models: dict[str, str], steps: int) -> dict[str, Any]:
    """One fine-tuning file a family, TOSICA's from scratch; row -> file."""
    base = {
        "name": "row",
        "data": {"uri": uri},
        "task": {"name": "annotation", "split": DONORS},
        "optim": {"lr": 2e-3, "warmup_steps": 10},
        "batch": {"cells_global": 16, "cells_micro": 16},
        "train": {"steps": steps, "log_every_steps": 60, "eval_every_steps": steps // 2},
        "engine": {"name": "torch"},
        "scale": {"workers": 1, "threads_per_worker": 1},
        "checkpoint": {"every_steps": steps // 2},
    }
    files: dict[str, Any] = {}
    for family, model in models.items():
        lost = {"data": {"allow_gene_loss": True}} if "vocab_genes" in SIZES[family]["data"] else {}
        files[family] = merge(base, {"init_from": model, **lost})
        files[f"{family}_scratch"] = merge(files[family], {"init_weights": False})
    tosica = {
        "data": {"vocab_genes": 3000},
        "model": {"family": "tosica", "gene_sets": "hallmark", "dropout": 0.1, "drop_path": 0.1},
    }
    files["tosica"] = merge(base, tosica)
    for name, raw in files.items():
        path = folder / "configs" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_toml(raw) + "\n")
        files[name] = str(path)
    return files


def tuned(folder: Path, files: dict[str, str], concurrent: int) -> dict[str, Any]:
    """The best learning rate of four for every file, by validation cells; rows of a benchmark."""
    best = {}
    for name, path in files.items():
        sweep = {
            "name": f"tune-{name}",
            "base": path,
            "algorithm": "grid",
            "scheduler": "none",
            "search": {"optim.lr": RATES},
            "concurrent": concurrent,
            "checkpoint": {"dir": str(folder)},
        }
        result = run_job(build_run("tune", sweep), say)
        say("\n".join(result.lines()))
        best[name] = result.best_config
    rows = {}
    for name in files:
        if not name.endswith("_scratch"):
            rows[name] = {"config": best[name], "tuning_budget": len(RATES)}
            if f"{name}_scratch" in best:
                rows[name]["scratch_config"] = best[f"{name}_scratch"]
    return rows


def annotation(
    uris: dict[str, str], rows: dict[str, Any], models: dict[str, str]
) -> dict[str, Any]:
    """Held-out donors (pancreas, interferon set) and, for want of donors, cells (PBMC).

    Frozen models on all three sets; whole fine-tuning, with its controls, on the pancreas.
    """
    people = {"column": "batch", "test_values": ["ctrl107", "stim107"]}
    unlabelled = ["", "nan", "NA", "unknown", "unlabelled (failed QC)"]
    return {
        "task": {"name": "annotation", "label": "cell_type"},
        "data": {"allow_gene_loss": True},
        "methods": {f"{name}_probe": model for name, model in frozen(models).items()},
        "datasets": {
            "pancreas": {
                "data": {"uri": uris["pancreas"]}, "license": "MIT, Apache-2.0",
                "task": {"split": DONORS}, "methods": rows,
            },
            "kang": {
                "data": {"uri": uris["kang"]}, "license": "GPL-3", "task": {"split": people},
            },
            "pbmc3k": {
                "data": {"uri": uris["pbmc3k"]}, "license": "MIT",
                "task": {"split": {"test_fraction": 0.2}, "ignore_labels": unlabelled},
            },
        },
    }  # fmt: skip


def frozen(models: dict[str, str]) -> dict[str, Any]:
    """Each pretrained model as it is."""
    return {name: {"model": path} for name, path in models.items()}


def reference_mapping(uris: dict[str, str], models: dict[str, str]) -> dict[str, Any]:
    """Queries are a held-out pancreas donor, and one of two people."""
    people = {"column": "batch", "test_values": ["ctrl107", "stim107"]}
    return {
        "task": {"name": "reference_mapping", "label": "cell_type"},
        "data": {"allow_gene_loss": True},
        "methods": frozen(models),
        "datasets": {
            "pancreas": {"data": {"uri": uris["pancreas"]}, "task": {"split": DONORS}},
            "kang": {"data": {"uri": uris["kang"]}, "task": {"split": people}},
        },
    }


def embedding(uris: dict[str, str], models: dict[str, str]) -> dict[str, Any]:
    """Zero-shot, scored by cell type and batch."""
    return {
        "task": {"name": "embedding", "label": "cell_type"},
        "data": {"allow_gene_loss": True},
        "methods": frozen(models),
        "datasets": {
            "pancreas": {"data": {"uri": uris["pancreas"]}, "task": {"batch": "donor"}},
        },
    }


def integration(uris: dict[str, str], models: dict[str, str], folder: Path) -> dict[str, Any]:
    """scGPT's recipe on five batches of five cell lines, beside the frozen models."""
    recipe = {
        "name": "row",
        "init_from": models["scgpt"],
        "data": {"uri": "set by the benchmark"},
        "task": {"name": "integration", "batch": "batch", "num_genes": 200},
        "optim": {"lr": 1e-3, "warmup_steps": 10},
        "batch": {"cells_global": 64, "cells_micro": 64},
        "train": {"steps": 100, "log_every_steps": 50, "eval_every_steps": 50},
        "engine": {"name": "torch"},
        "scale": {"workers": 1, "threads_per_worker": 1},
        "checkpoint": {"every_steps": 50},
    }
    path = folder / "configs" / "integration.toml"
    path.write_text(to_toml(recipe) + "\n")
    return {
        "task": {"name": "integration", "label": "cell_type", "batch": "batch", "num_genes": 200},
        "data": {"allow_gene_loss": True},
        "methods": {"scgpt_integrated": str(path), **frozen(models)},
        "datasets": {"cellmix": {"data": {"uri": uris["cellmix"]}, "license": "MIT"}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--concurrent", type=int, default=2)
    given = parser.parse_args()
    cells = Path(os.environ["CELLRAY_DATA"]) / "cells"
    folder = given.folder.resolve()
    uris = stores(folder, cells)
    models = pretrained(folder, uris["corpus"], given.pretrain_steps)
    wanted = given.only or ["annotation", "reference_mapping", "embedding", "integration"]
    rows = {}
    if "annotation" in wanted:
        files = finetune_files(folder, uris["pancreas"], models, given.steps)
        rows = tuned(folder, files, given.concurrent)
    tables = {
        "annotation": annotation(uris, rows, models),
        "reference_mapping": reference_mapping(uris, models),
        "embedding": embedding(uris, models),
        "integration": integration(uris, models, folder),
    }
    for name, table in tables.items():
        if name not in wanted:
            continue
        raw = {"name": name, "seeds": SEEDS, "concurrent": given.concurrent, **table,
               "checkpoint": {"dir": str(folder)}}  # fmt: skip
        result = run_job(build_run("benchmark", raw), say)
        say("\n".join(result.lines()))
        boards = {k: json.loads(v.to_json(orient="records")) for k, v in result.tables.items()}
        (folder / f"{name}.json").write_text(json.dumps(boards, indent=1))
        shown = [
            f"## {name}: {one}\n\n{(folder / name / one / 'leaderboard.md').read_text()}"
            for one in result.tables
        ]
        (folder / f"{name}.md").write_text("\n".join(shown))


if __name__ == "__main__":
    main()
