"""MLflow: reachability is checked first, runs nest, tables and metrics read back."""

import http.server
import threading

import mlflow
import pandas as pd
import pytest

from cellray.core.errors import TrackingError
from cellray.train import tracking
from cellray.train.config import TrackingSection
from cellray.train.tracking import Tracker, check_tracking, open_command, tracking_uri


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


class _NotMlflow(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *words):
        pass


def test_a_server_that_does_not_answer():
    with pytest.raises(TrackingError, match=r"http://127.0.0.1:9 does not answer .*start it"):
        check_tracking("http://127.0.0.1:9", timeout_s=1)


def test_a_server_that_is_not_mlflow():
    server = http.server.HTTPServer(("127.0.0.1", 0), _NotMlflow)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    with pytest.raises(TrackingError, match="answers, but not as an MLflow server"):
        check_tracking(f"http://127.0.0.1:{server.server_port}")
    thread.join()
    server.server_close()


def test_an_unknown_scheme():
    with pytest.raises(TrackingError, match="'ftp://x' is not supported; give a server"):
        check_tracking("ftp://x")


def test_the_default_store_lies_beside_the_runs(tmp_path):
    uri = tracking_uri(TrackingSection(), str(tmp_path / "runs"))
    assert uri == f"sqlite:///{tmp_path.resolve() / 'runs' / 'mlflow.db'}"
    check_tracking(uri)
    assert (tmp_path / "runs").is_dir()
    assert open_command(uri) == f"mlflow ui --backend-store-uri {uri}"


def test_a_long_note_ends_with_a_whole_line_and_says_so(uri):
    run = Tracker.start(uri, experiment="bench", name="noted")
    client = mlflow.MlflowClient(tracking_uri=uri)
    lines = [f"| row {i} | {'x' * 90} |" for i in range(100)]
    run.note("\n".join(lines) + "\n")
    said = client.get_run(run.run_id).data.tags["mlflow.note.content"]
    assert 7500 < len(said) <= 8000
    *kept, _, last = said.split("\n")
    assert kept == lines[: len(kept)]
    assert last == f"(further lines, in the artifacts: {100 - len(kept)})"
    run.note("short")
    assert client.get_run(run.run_id).data.tags["mlflow.note.content"] == "short"


def test_runs_nest_and_read_back(uri):
    parent = Tracker.start(uri, experiment="bench", name="parent")
    child = Tracker.start(
        uri, experiment="bench", name="child", parent=parent.run_id, tags={"method": "knn"}
    )
    other = Tracker.start(uri, experiment="bench", name="alone")
    child.params({f"key{i}": i for i in range(250)})
    child.params({"key0": "again", "late": 1})  # a resumed run logs its parameters again
    for step in (1, 2):
        child.metrics({"loss": 1 / step, "step": step, "epoch": 0}, step=step)
    child.table(pd.DataFrame({"a": [1, 2]}), "tables/t.json")
    child.note("# hello")
    child.end()
    parent.end("FAILED")
    found = parent.children({"method": "knn"})
    assert [r.info.run_id for r in found] == [child.run_id]
    data = found[0].data
    assert data.metrics == {"loss": 0.5}
    assert len(data.params) == 251
    assert data.params["key0"] == "0"
    assert data.tags["git_commit"] not in ("", None)
    client = mlflow.MlflowClient(tracking_uri=uri)
    assert [m.value for m in client.get_metric_history(child.run_id, "loss")] == [1.0, 0.5]
    assert client.get_run(parent.run_id).info.status == "FAILED"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("bench")
    table = mlflow.load_table("tables/t.json", run_ids=[child.run_id])
    assert table["a"].tolist() == [1, 2]
    assert other.children() == []


def test_parents_are_found_by_tag_and_children_are_not(uri):
    first = Tracker.start(uri, experiment="find", name="a", tags={"cellray.task": "annotation"})
    second = Tracker.start(uri, experiment="find", name="b", tags={"cellray.task": "embedding"})
    Tracker.start(uri, experiment="find", name="c", parent=first.run_id, tags={"cellray.task": "x"})
    Tracker.start(uri, experiment="find", name="d")
    elsewhere = Tracker.start(uri, experiment="other", name="e", tags={"cellray.task": "embedding"})

    def ids(**how):
        return {run.info.run_id for run in Tracker.find_parents(uri, **how)}

    any_task = ids(experiment="find", tags={"cellray.task": ""})
    assert any_task == {first.run_id, second.run_id}
    assert ids(tags={"cellray.task": "embedding"}) == {second.run_id, elsewhere.run_id}
    with pytest.raises(TrackingError, match="no experiment 'fin'. Did you mean 'find'"):
        ids(experiment="fin")


def test_files_of_a_run_are_fetched_by_kind(uri, tmp_path):
    run = Tracker.start(uri, experiment="fetch", name="a")
    for name in ("b.png", "a.png", "c.html"):
        (tmp_path / name).write_text(name)
        run.artifact(tmp_path / name, "report")
    target = tmp_path / "target"
    target.mkdir()
    found = run.fetch("report", target, suffixes=(".png",))
    assert [path.name for path in found] == ["a.png", "b.png"]
    assert found[0].read_text() == "a.png"
    assert run.fetch("nothing", target, suffixes=(".png",)) == []
    with pytest.raises(TrackingError, match="has no run 'gone'"):
        Tracker(uri, "gone").run()


def test_children_are_found_page_by_page(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'pages.db'}"
    parent = Tracker.start(uri, experiment="pages", name="parent")
    names = {f"child{i}" for i in range(5)}
    for name in sorted(names):
        Tracker.start(uri, experiment="pages", name=name, parent=parent.run_id).end()
    monkeypatch.setattr(tracking, "_PAGE_RUNS", 2)
    assert {run.info.run_name for run in parent.children()} == names
