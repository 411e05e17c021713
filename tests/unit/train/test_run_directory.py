import json
import multiprocessing

import pytest

from cellray.core.errors import CheckpointError, DataError
from cellray.train.rundir import RunDirectory


def test_progress_after_the_step_of_the_checkpoint_is_dropped(tmp_path):
    run = RunDirectory(str(tmp_path), "a")
    run.rewind(4)  # nothing was reported yet
    run.path.mkdir()
    rows = "".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (2, 4, 6))
    rows = rows.replace('{"step": 4', '{"st\x00ep\n{"step": 4')  # a disk's damage in the middle
    run.progress.write_text(rows + '{"step": 7, "lo')  # the driver died in the middle of a row
    run.rewind(4)
    assert [json.loads(r)["step"] for r in run.progress.read_text().splitlines()] == [2, 4]
    assert [p.name for p in run.path.iterdir()] == ["metrics.jsonl"]


def hold(root, held, leave):
    with RunDirectory(root, "a").held():
        held.set()
        leave.wait(60)


def test_one_process_trains_a_run_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), held, leave))
    other.start()
    assert held.wait(60)
    run = RunDirectory(str(tmp_path), "a")
    told = rf"'a' in .* is being trained by process {other.pid} on .*; wait for it"
    with pytest.raises(CheckpointError, match=told), run.held():
        pass
    with RunDirectory(str(tmp_path), "b").held():  # another run is free
        pass
    other.kill()  # and so is this one once its process is gone, however it went
    other.join()
    with run.held(), pytest.raises(CheckpointError, match="is being trained"), run.held():
        pass
    with run.held():
        pass


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"a": 1}', "{"])
def test_a_damaged_record_of_a_run_is_never_taken_for_a_new_run(tmp_path, text):
    directory = RunDirectory(str(tmp_path), "run")
    directory.enter({"name": "run"}, {}, "auto")
    (directory.path / "run.json").write_text(text)
    with pytest.raises(DataError, match="run.json' is damaged, no file of a run: .* another name"):
        directory.enter({"name": "run"}, {}, "auto")
    assert (directory.path / "run.json").read_text() == text
