import json

from cellray.train.rundir import RunDirectory


def test_progress_after_the_step_of_the_checkpoint_is_dropped(tmp_path):
    run = RunDirectory(str(tmp_path), "a")
    run.rewind(4)  # nothing was reported yet
    run.path.mkdir()
    rows = "".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in (2, 4, 6))
    run.progress.write_text(rows + '{"step": 7, "lo')  # the driver died in the middle of a row
    run.rewind(4)
    assert [json.loads(r)["step"] for r in run.progress.read_text().splitlines()] == [2, 4]
    assert [p.name for p in run.path.iterdir()] == ["metrics.jsonl"]
