"""The README's commands exist and do what it says; the two commands are in the Makefile."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from cellray.cli import main
from cellray.core.registry import names
from cellray.core.section import read_toml
from cellray.runs import JOBS, load_run
from cellray.tasks.base import task
from helpers_upstream import (
    SB,
    SF,
    TO,
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

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in COMMANDS if line]
CELLRAY = [shlex.split(line)[1:] for line in COMMANDS if line.startswith("cellray ")]


def cellray(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cellray.cli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_readme_names_every_command():
    assert {words[0] for words in CELLRAY} == {
        *JOBS,
        "submit",
        "show",
        "copy",
        "relayout",
        "import-weights",
        "doctor",
        "plan",
        "published",
        "annotate",
        "compare",
    }


def test_the_import_commands_of_the_readme_work_on_files_of_those_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lists = {"panglao_10000.h5ad": SB["genes"], "reference.h5ad": TO["genes"]}
    for name, count in lists.items():
        genes = pd.DataFrame(index=[f"GENE{i}" for i in range(count)])
        ad.AnnData(np.ones((1, count), dtype=np.float32), var=genes).write_h5ad(name)
    rows = [f"GENE{i}\t{i}" for i in range(SF["genes"])]
    Path("OS_scRNA_gene_index.19264.tsv").write_text("\n".join(["gene_name\tindex", *rows]))
    scgpt_folder(Path("scGPT_human"), scgpt_weights())
    geneformer_folder(Path("Geneformer-V2-104M"), second=True)
    scbert_file(Path("panglao_pretrain.pth"), scbert_weights())
    scfoundation_file(Path("models.ckpt"), scfoundation_weights())
    tosica_folder(Path("my_tosica_project"), tosica_weights())
    words = {tuple(w) for w in CELLRAY if w[0] == "import-weights"}
    assert {w[1] for w in words} == set(names("cellray.models"))
    for command in sorted(words):
        assert main(list(command)) == 0
        assert (tmp_path / command[3] / "manifest.json").is_file()


@pytest.mark.parametrize("words", [w for w in CELLRAY if w[0] in JOBS], ids=" ".join)
def test_every_job_in_the_readme_has_a_valid_configuration(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = [w for w in words[2:] if "=" in w]
    run = load_run(words[0], words[1], overrides)
    assert run.name


def test_every_shipped_configuration_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = sorted((ROOT / "jobs" / "configs").rglob("*.toml"))
    assert len(files) >= 8
    for file in files:
        assert load_run(file.parent.name, file).name


def test_make_has_the_two_commands_and_ci_calls_one_of_them():
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
def test_ingest_check_show_copy_relayout_and_doctor_run_as_the_readme_says(tmp_path):
    """From a folder that holds what the configurations name, as a stranger would."""
    for name in ("jobs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = cellray(*CELLRAY[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "store: " in done.stdout
    assert "2161 cells" in done.stdout
    check = next(w for w in CELLRAY if "--check" in w)
    done = cellray(*check, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "steps: 120" in done.stdout
    assert "memory of a worker, micro-batch of" in done.stdout
    assert "shuffle: a batch holds" in done.stdout
    show = next(w for w in CELLRAY if w[0] == "show")
    done = cellray(*show, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cells: 2161" in done.stdout
    assert not (tmp_path / "runs" / "demo" / "pretrain-scgpt").exists()
    for name in ("copy", "relayout"):
        words = next(w for w in CELLRAY if w[0] == name)
        done = cellray(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = cellray("show", words[2], cwd=tmp_path)
        assert "cells: 2161" in done.stdout, done.stderr
    again = cellray(*CELLRAY[0], cwd=tmp_path)
    assert again.returncode == 1
    assert "ingest.append = false" in again.stderr
    doctor = cellray("doctor", cwd=tmp_path)
    assert "python" in doctor.stdout.lower()


SHORT = {
    "pretrain": ["train.steps=6", "train.log_every_steps=3", "train.eval_every_steps=6"],
    "finetune": ["train.steps=6", "train.eval_every_steps=6", "checkpoint.every_steps=6"],
    "tune": [
        "trials=1",
        'overrides=["train.steps=6", "train.eval_every_steps=3", "optim.warmup_steps=0"]',
    ],
    "benchmark": ["methods={}", "seeds=[0]"],
}


@pytest.mark.slow
@pytest.mark.ray
def test_the_jobs_of_the_readme_run_one_after_the_other(ray_cluster, tmp_path, monkeypatch, capsys):
    """Every job command, in the README's order, shortened; each finds what the last one left."""
    for name in ("jobs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in CELLRAY:
        if words[0] not in JOBS or "--check" in words:
            continue
        short = [*words, *SHORT.get(words[0], [])]
        if words[0] in ("pretrain", "finetune"):
            short.append("optim.warmup_steps=0")
        assert main(short) == 0, capsys.readouterr().err
        ran.append(words[0])
    assert ran == [*"ingest synthesize pretrain finetune tune embed map benchmark".split()]
    told = capsys.readouterr().out
    for text in (
        "store: ",
        "test macro_f1.union.v1",
        "next: cellray finetune",
        "umap: ",
        "MLflow: ",
    ):
        assert text in told
    assert (tmp_path / "runs/demo/my-run/model/manifest.json").is_file()
    assert (tmp_path / "runs/demo/embed-scgpt/umap.png").is_file()
    assert (tmp_path / "runs/demo/tune-scgpt/best.toml").is_file()
    assert (tmp_path / "runs/demo/benchmark/report.html").is_file()


def test_errors_are_one_line_and_exit_with_1(tmp_path):
    done = cellray("pretrain", "jobs/configs/pretrain/demo_scgp.toml")
    assert done.returncode == 1
    assert "Did you mean 'demo_scgpt.toml'" in done.stderr
    assert "Traceback" not in done.stderr
    done = cellray("pretrain", "jobs/configs/pretrain/demo_scgpt.toml", "optm.lr=1")
    assert done.returncode == 1
    assert "unknown key 'optm'. Did you mean 'optim'?" in done.stderr
    done = cellray("pretrain", "jobs/configs/pretrain/demo_scgpt.toml", "--check", "optim.lr=inf")
    assert done.returncode == 1
    assert "optim.lr" in done.stderr
    done = cellray("benchmark", "--check", "jobs/configs/benchmark/demo.toml", "data.uri=/nope/x")
    assert done.returncode == 1
    assert "no store at '/nope/x'" in done.stderr
    target = str(tmp_path / "new")
    done = cellray("relayout", str(tmp_path), target, "--tiledb", "vfs.s3.endpoint_overide=x")
    assert done.returncode == 1
    assert "vfs.s3.endpoint_override" in done.stderr
    done = cellray("show", str(tmp_path / "nothing"))
    assert done.returncode == 1
    assert "nothing at" in done.stderr


def test_the_demo_table_in_the_readme_has_all_rows():
    methods = list(read_toml(ROOT / "jobs" / "configs" / "benchmark" / "demo.toml")["methods"])
    controls = [f"{name}_{control}" for name in methods for control in ("scratch", "random")]
    for name in [*methods, *controls, *task("annotation").compulsory]:
        assert re.search(rf"^{name} +[a-z -]+ 3 +0\.\d+ ", README, flags=re.MULTILINE), name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
