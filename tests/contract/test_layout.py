"""The house rules that a machine can check: folders, imports, sizes, side effects."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "cellray"
MODULES = sorted(PACKAGE.rglob("*.py"))

# One third-party system, few files.
HOMES = {
    "ray": {
        "data/datasource.py",
        "data/pipeline.py",
        "data/synthetic_blocks.py",
        "data/ingest_tasks.py",
        "train/worker.py",
        "train/trainer.py",
        "train/progress.py",
        "train/telemetry.py",
        "tune/board.py",
        "tune/inside.py",
        "tune/schedule.py",
        "tune/sweep.py",
        "bench/queue.py",
        "bench/suite.py",
        "ops/submit.py",
        "ops/doctor.py",
        "ops/environment.py",
    },
    "deepspeed": {"train/deepspeed.py"},
    "tiledbsoma": {
        "data/soma.py",
        "data/storage.py",
        "data/ingest.py",
        "data/relayout.py",
        "data/writer.py",
        "data/synthetic.py",
        "data/synthetic_blocks.py",
        "data/synthetic_truth.py",
        "data/parts.py",
    },
    "mlflow": {"train/tracking.py", "infer/load.py", "infer/predict.py", "infer/registered.py"},
    "igraph": {"metrics/graphs.py"},
    "harmonypy": {"baselines/harmony.py"},  # GPL-3.0: called, in an extra
    "scvi": {"baselines/scvi.py"},
}

# Who may import whom, inside the package (beside itself and core).
MAY_IMPORT = {
    "core": set(),
    "nn": set(),
    "data": {"tokenizers"},  # the tokenizers' interface: actors fuse reading and tokenising
    "tokenizers": {"data"},
    "objectives": {"data", "nn"},
    "models": {"data", "nn", "objectives", "tokenizers"},
    "metrics": set(),
    "baselines": {"data", "metrics"},
    "tasks": {"baselines", "data", "metrics", "models", "objectives", "nn"},
    "guards": {"data", "metrics", "tasks"},
}

NO_TORCH = ["core/blocks.py", "data/vocab.py", "data/plan.py"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_platform_is_a_source_root_and_not_a_package():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert hasattr(platform, "system")
    assert "cellray" not in (platform.__file__ or "")


def test_top_level_holds_what_was_agreed():
    allowed = {
        "pyproject.toml", "README.md", "platform", "jobs", "tests", "cluster", "dashboards",
        "LICENSE", "Makefile", "CHANGELOG.md", "constraints.txt",
    }  # fmt: skip
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert {name for name in top if not name.startswith(".")} <= allowed


@pytest.mark.parametrize("system", sorted(HOMES))
def test_a_third_party_system_enters_through_its_files_only(system):
    users = {
        name_of(p)
        for p in MODULES
        if any(i == system or i.startswith(f"{system}.") for i in imports_of(p))
    }
    assert users <= HOMES[system]


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_who_may_import_whom(package):
    allowed = MAY_IMPORT[package] | {"core", package}
    for path in sorted((PACKAGE / package).rglob("*.py")):
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "cellray" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                assert parts[1] in allowed, f"{name_of(path)} imports {name}"


def test_metrics_need_numpy_scipy_and_scikit_learn_only():
    allowed = {"cellray", "igraph", "numpy", "scipy", "sklearn"} | set(sys.stdlib_module_names)
    for path in sorted((PACKAGE / "metrics").glob("*.py")):
        for name in imports_of(path):
            assert name.split(".")[0] in allowed, f"{name_of(path)} imports {name}"


def test_models_never_touch_a_store_and_tasks_never_name_a_family():
    for path in (PACKAGE / "models").glob("*.py"):
        assert "cellray.data.soma" not in imports_of(path), path
    families = {p.stem for p in (PACKAGE / "models").glob("*.py")} - {"base", "__init__"}
    for path in (PACKAGE / "tasks").glob("*.py"):
        for family in families:
            assert f"cellray.models.{family}" not in imports_of(path), path
            assert f'"{family}"' not in path.read_text(), path


def test_no_family_is_named_outside_its_own_file():
    families = {p.stem for p in (PACKAGE / "models").glob("*.py")} - {"base", "__init__"}
    for path in MODULES:
        constants = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        named = constants & families
        if path.parent.name == "models":
            named -= {path.stem}
        assert not named, f"{name_of(path)} names {named}"


@pytest.mark.parametrize("name", NO_TORCH)
def test_these_files_never_import_torch(name):
    assert not any(i.split(".")[0] == "torch" for i in imports_of(PACKAGE / name))


def test_tokenizers_never_import_torch():
    code = (
        "import sys, cellray.tokenizers.bins, cellray.tokenizers.rank\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_families_import_without_the_heavy_systems():
    code = (
        "import sys\n"
        "for name in ('ray', 'deepspeed', 'tiledbsoma', 'mlflow'): sys.modules[name] = None\n"
        "import cellray.models.scgpt, cellray.models.geneformer, cellray.runs, cellray.cli\n"
        "import cellray\n"
        "print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_every_module_imports_alone_and_leaves_the_environment_as_it_was():
    code = (
        "import importlib, logging, os, sys\n"
        "before = dict(os.environ)\n"
        "importlib.import_module(sys.argv[1])\n"
        "if not sys.argv[1].endswith(('deepspeed', 'sweep', 'finetune')):\n"
        "    ours = {k for k in os.environ if os.environ.get(k) != before.get(k)}\n"
        "    assert not {k for k in ours if k.startswith(('CELLRAY', 'RAY_AUTH'))}, ours\n"
    )
    # in groups, to share the cost of starting: each of these pulls in all that is below it
    for module in ("cli", "core.draw", "data.ingest", "nn.attention", "metrics.integration"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, f"cellray.{module}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{module}: {done.stderr}"


def test_files_and_functions_stay_readable():
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 500, f"{name_of(path)} is longer than 500 lines"
        tree = ast.parse(text)
        assert ast.get_docstring(tree), f"{name_of(path)} does not state its responsibility"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{name_of(path)}:{node.name} has {length} lines"


def test_job_entry_points_are_thin():
    jobs = {p.stem for p in (ROOT / "jobs").glob("*.py")}
    assert {"ingest", "pretrain", "finetune", "tune", "embed", "benchmark"} <= jobs
    for path in (ROOT / "jobs").glob("*.py"):
        assert path.read_text().count("\n") <= 30, path


def test_the_pinned_set_satisfies_the_declared_ranges():
    from packaging.requirements import Requirement

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = declared["dependencies"] + declared["optional-dependencies"]["dev"]
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name.lower().replace("_", "-")] = version
    for text in wanted:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(pinned[name]), f"{text}: {pinned[name]} is pinned"
    assert pinned["torch"] == "2.13.0"


def test_what_tiledb_reads_is_read_with_our_settings():
    """Its own settings crash now and then, see data/storage.py; writing them is no matter."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "open" or not ast.unparse(node.func).startswith("tiledbsoma."):
                continue
            writes = any(isinstance(a, ast.Constant) and a.value == "w" for a in node.args)
            ours = any(k.arg == "context" for k in node.keywords)
            assert writes or ours, f"{name_of(path)}:{node.lineno} opens without a context"
