"""The ``cellray`` command: eight jobs, submission, whole stores, and looking at what there is."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cellray.core.errors import CellrayError, ConfigError
from cellray.core.section import read_toml, to_dict, to_toml
from cellray.runs import JOBS, load_run, run_job

__all__ = ["main"]

_JOB_HELP = {
    "ingest": "h5ad files -> one TileDB-SOMA experiment",
    "synthesize": "a synthetic atlas with known biology -> a TileDB-SOMA experiment",
    "pretrain": "self-supervised pretraining of a model family on a store",
    "finetune": "supervised fine-tuning from a checkpoint, or from scratch",
    "tune": "a Ray Tune sweep of fine-tuning runs",
    "embed": "cell embeddings and a UMAP picture",
    "map": "labels of query cells from the nearest cells of a reference embedded once",
    "benchmark": "methods x seeds beside the baselines, as an MLflow table",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cellray",
        description="Distributed data and training platform for single-cell foundation models.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for job, text in _JOB_HELP.items():
        sub = commands.add_parser(job, help=text, description=text)
        sub.add_argument("words", nargs="*", metavar="FILE.toml | key=value")
        sub.add_argument(
            "--check",
            action="store_true",
            help="validate, print the resolved configuration and an estimate, start nothing",
        )
    _add_plan(commands)
    submit = commands.add_parser("submit", help="run a job on a running Ray cluster (Ray Jobs)")
    submit.add_argument("job", metavar="JOB", help=", ".join(JOBS))
    submit.add_argument("words", nargs="*", metavar="FILE.toml | key=value")
    submit.add_argument("--address", required=True, help="e.g. http://head:8265")
    submit.add_argument("--no-wait", action="store_true", help="return once it is accepted")
    show = commands.add_parser("show", help="what a store, checkpoint or run holds, in words")
    show.add_argument("path")
    copy = commands.add_parser("copy", help="a whole store to or from an object store")
    copy.add_argument("source", metavar="SRC", help="a folder, s3://bucket/store or census:...")
    copy.add_argument("target", metavar="DST", help="a folder or s3://bucket/store")
    rewrite = commands.add_parser("relayout", help="a SOMA experiment in the training layout")
    rewrite.add_argument("source", metavar="SRC", help="e.g. a Census organism")
    rewrite.add_argument("target", metavar="DST", help="a local folder that does not exist yet")
    rewrite.add_argument("--measurement", default="RNA")
    rewrite.add_argument("--layer", default="raw")
    rewrite.add_argument("--obs-filter", default="", help='cells to keep, e.g. "nnz >= 200"')
    rewrite.add_argument(
        "--workers", type=int, default=0, help="processes; 0: one a CPU, as many as pay"
    )
    weights = commands.add_parser(
        "import-weights", help="published weights -> a checkpoint, every key accounted for"
    )
    weights.add_argument("family", metavar="FAMILY", help="one of cellray.models")
    weights.add_argument("source", metavar="SRC", help="the published file or folder")
    weights.add_argument("target", metavar="DST", help="a folder that does not exist yet")
    weights.add_argument(
        "--genes", default="", help="gene list, if none, or several, lie beside the weights"
    )
    weights.add_argument("--medians", default="", help="non-zero medians, likewise")
    weights.add_argument(
        "--labels",
        default="",
        help="class names in code order: JSON or pickle, a table (number, name), or one a line",
    )
    weights.add_argument("--entry", default="", help="which of several models of a file")
    weights.add_argument("--heads", type=int, default=0, help="if the file does not say")
    weights.add_argument(
        "--allow-code", action="store_true", help="read pickles that may run their maker's code"
    )
    for sub in (show, copy, rewrite):
        sub.add_argument(
            "--tiledb",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a TileDB setting, e.g. vfs.s3.endpoint_override=http://localhost:9000",
        )
    _add_compare(commands)
    _add_published(commands)
    commands.add_parser("doctor", help="what this machine has, what is missing, what to do")
    return parser


def _add_published(commands: Any) -> None:
    text = "published benchmark files: what is known and present, and one as a store"
    known = commands.add_parser("published", help=text, description=text)
    known.add_argument("name", nargs="?", default="", metavar="NAME", help="none: list them")
    known.add_argument("--folder", default="", help="where files lie ($CELLRAY_DATA/published)")
    known.add_argument("--store", default="", help="the store to make")
    known.add_argument("--pins", default="", metavar="FILE.toml", help="with [published.sha256]")
    known.add_argument(
        "--leave-out", action="store_true", help="leave out batches that hold no counts"
    )


def _add_plan(commands: Any) -> None:
    text = "steps, hours, cost, memory by ZeRO stage and disk of a training run, before it starts"
    plan = commands.add_parser("plan", help=text, description=text)
    plan.add_argument("words", nargs="*", metavar="FILE.toml | key=value")
    plan.add_argument("--hardware", default="", help="h100, a100, h200, cpu ... or NAME:TFLOPS:GB")
    plan.add_argument("--gpus", type=int, help="workers, in the place of scale.workers")
    plan.add_argument("--cells-per-second", type=float, help="measured, of one worker")
    plan.add_argument("--mfu", type=float, help="assumed share of the peak (0.3)")
    plan.add_argument("--price", type=float, help="of a GPU-hour, in any currency")


def _add_compare(commands: Any) -> None:
    text = "tables of finished benchmarks in the terminal and as one HTML page"
    compare = commands.add_parser("compare", help=text, description=text)
    compare.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a benchmark's run directory, runs:/ID of its MLflow parent run, or an experiment",
    )
    compare.add_argument("--html", default="", metavar="FILE", help="where to write the page")
    compare.add_argument(
        "--mlflow-uri", default="", metavar="URI", help="of sources that are no run directory"
    )
    compare.add_argument(
        "--metric", action="append", default=[], metavar="ID", help="show it (repeat for several)"
    )


def _split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration file (at most one, first) and the overrides among the words."""
    overrides = [w for w in words if "=" in w and not Path(w).is_file()]
    files = [w for w in words if w not in overrides]
    if len(files) > 1:
        raise ConfigError(
            f"one configuration file at most, given: {', '.join(files)}; overrides are written "
            "section.key=value without spaces"
        )
    return (files[0] if files else None), overrides


def say(line: str) -> None:
    """Print a progress line at once."""
    print(line, flush=True)


def _check(job: str, words: Sequence[str]) -> int:
    from cellray.ops.planner import estimate

    path, overrides = _split_words(words)
    run = load_run(job, path, overrides)
    print(to_toml(to_dict(run)))
    print()
    for line in estimate(run):
        print(line)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from cellray.ops.planner import PlanOptions, estimate

    path, overrides = _split_words(arguments.words)
    if path is None:
        raise ConfigError("cellray plan needs a configuration file: plan FILE.toml")
    for name in ("gpus", "cells_per_second", "mfu", "price"):
        value = getattr(arguments, name)
        if value is not None and (value <= 0 or (name == "mfu" and value > 1)):
            most = " and at most 1" if name == "mfu" else ""
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: give a number above 0{most}")
    raw = read_toml(path)
    run = load_run("finetune" if "task" in raw else "pretrain", path, overrides)
    options = PlanOptions(
        hardware=arguments.hardware,
        workers=arguments.gpus or 0,
        cells_per_second=arguments.cells_per_second or 0.0,
        mfu=arguments.mfu or 0.0,
        price=arguments.price or 0.0,
    )
    for line in estimate(run, options):
        print(line)
    return 0


def _job(job: str, words: Sequence[str], *, check: bool) -> int:
    if check:
        return _check(job, words)
    path, overrides = _split_words(words)
    run = load_run(job, path, overrides)
    result = run_job(run, say)
    for line in getattr(result, "lines", lambda: [])():
        print(line)
    return 0


def _settings(words: Sequence[str]) -> dict[str, str]:
    """The ``--tiledb KEY=VALUE`` of the command line."""
    pairs = [word.partition("=") for word in words]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise ConfigError(f"--tiledb {key}: write it KEY=VALUE, e.g. vfs.s3.region=us-west-2")
    return {key: value for key, _, value in pairs}


def _copy(source: str, target: str, tiledb: Sequence[str]) -> int:
    from cellray.data.copying import copy_store

    report = copy_store(source, target, tiledb=_settings(tiledb), progress=say)
    print(
        f"{report.target}: {report.files} files, {report.bytes / 1e6:.1f} MB, of which "
        f"{report.files_copied} copied in {report.seconds:.1f} s"
    )
    return 0


def _show(path: str, tiledb: Sequence[str]) -> int:
    from cellray.ops.show import show

    for line in show(path, tiledb=_settings(tiledb)):
        print(line)
    return 0


def _relayout(arguments: argparse.Namespace) -> int:
    from cellray.data.relayout import relayout

    report = relayout(
        arguments.source,
        arguments.target,
        measurement=arguments.measurement,
        layer=arguments.layer,
        obs_filter=arguments.obs_filter,
        workers=arguments.workers,
        tiledb=_settings(arguments.tiledb),
        progress=say,
    )
    for line in report.lines():
        print(line)
    return 0


def _import_weights(arguments: argparse.Namespace) -> int:
    from cellray.infer.import_weights import import_weights

    report = import_weights(
        arguments.family,
        arguments.source,
        arguments.target,
        genes=arguments.genes,
        medians=arguments.medians,
        labels=arguments.labels,
        entry=arguments.entry,
        heads=arguments.heads,
        allow_code=arguments.allow_code,
    )
    for line in report.lines():
        print(line)
    return 0


def _submit(arguments: argparse.Namespace) -> int:
    from cellray.ops.submit import submit

    path, overrides = _split_words(arguments.words)
    if path is None:
        raise ConfigError("cellray submit needs a configuration file: submit JOB FILE.toml")
    return submit(
        arguments.job,
        path,
        overrides,
        arguments.address,
        wait=not arguments.no_wait,
        progress=say,
    )


def _compare(arguments: argparse.Namespace) -> int:
    from cellray.bench.compare import compare

    compare(
        arguments.sources,
        say,
        html=arguments.html,
        mlflow_uri=arguments.mlflow_uri,
        metrics=arguments.metric or None,
    )
    return 0


def _published(arguments: argparse.Namespace) -> int:
    from cellray.data.published import default_folder, listing, published, read_pins

    folder = Path(arguments.folder) if arguments.folder else default_folder()
    if not arguments.name:
        for line in listing(folder):
            print(line)
        return 0
    published(arguments.name)
    if folder is None or not arguments.store:
        given = "--store" if folder else "--folder (or set CELLRAY_DATA)"
        raise ConfigError(f"cellray published {arguments.name} needs {given}")
    from cellray.data.published_store import make_store

    made = make_store(
        arguments.name,
        folder,
        arguments.store,
        pins=read_pins(arguments.pins) if arguments.pins else {},
        leave_out=arguments.leave_out,
        progress=say,
    )
    for line in made.lines():
        print(line)
    return 0


def _doctor() -> int:
    from cellray.ops.doctor import doctor

    findings = doctor()
    for finding in findings:
        advice = f"  -> {finding.advice}" if finding.advice else ""
        print(f"{finding.status:8}{finding.what}{advice}")
    return int(any(f.status == "missing" for f in findings))


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error, 130 when interrupted."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(arguments, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest  # overrides that stand behind an option
    try:
        if arguments.command in JOBS:
            return _job(arguments.command, arguments.words, check=arguments.check)
        if arguments.command == "plan":
            return _plan(arguments)
        if arguments.command == "submit":
            return _submit(arguments)
        if arguments.command == "show":
            return _show(arguments.path, arguments.tiledb)
        if arguments.command == "copy":
            return _copy(arguments.source, arguments.target, arguments.tiledb)
        if arguments.command == "relayout":
            return _relayout(arguments)
        if arguments.command == "import-weights":
            return _import_weights(arguments)
        if arguments.command == "compare":
            return _compare(arguments)
        if arguments.command == "published":
            return _published(arguments)
        return _doctor()
    except (CellrayError, PermissionError, FileNotFoundError, NotADirectoryError) as error:
        print(f"cellray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cellray: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
