"""What tests share: one local Ray a session, a small known store, the real demo cells."""

from __future__ import annotations

import faulthandler
import os
import signal
from pathlib import Path

import pytest

from helpers_cells import known_cells

REPOSITORY = Path(__file__).resolve().parent.parent
PANCREAS = REPOSITORY / "tests" / "data" / "pancreas"

INTERRUPT = signal.getsignal(signal.SIGINT)

# What tests read with TileDB's own settings must not crash either, see cellray/data/storage.py.
os.environ.setdefault("TILEDB_SM_QUERY_SPARSE_GLOBAL_ORDER_PREPROCESS_TILE_MERGE", "0")


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """A crash shows the stack of the thread that crashed, not those of all others before it."""
    plugin = config.pluginmanager.get_plugin("faulthandler")
    key = getattr(plugin, "fault_handler_stderr_fd_key", None)
    if key is not None and key in config.stash:
        faulthandler.enable(file=config.stash[key], all_threads=False)


@pytest.fixture(autouse=True)
def _keeps_the_interrupt_handler():
    """Ctrl-C must work after anything of ours: Ray Train and Ray Tune leave handlers behind."""
    yield
    left = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, INTERRUPT)
    assert left is INTERRUPT, f"{left} is left as the handler of SIGINT"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def cellray_data() -> Path:
    """The folder of further real data; tests that need it are not run without it."""
    folder = os.environ.get("CELLRAY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("not run: CELLRAY_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all tests that need one."""
    import ray

    from cellray.ops.environment import local_ray_environment

    os.environ.update(local_ray_environment())
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_store(tmp_path_factory) -> str:
    """A SOMA store of :func:`known_cells`."""
    from cellray.data.ingest import IngestConfig, ingest

    folder = tmp_path_factory.mktemp("small")
    known_cells().write_h5ad(folder / "cells.h5ad")
    uri = str(folder / "store")
    ingest(IngestConfig(files=[str(folder / "cells.h5ad")], uri=uri))
    return uri
