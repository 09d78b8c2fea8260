import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agri_moe.runs import (
    Lock,
    Run,
    damage,
    differences,
    fingerprint,
    mark_complete,
    new_run,
    newest_checkpoint,
    set_aside,
    unfinished_run,
)


def checkpoint(run: Run, step: int, content: bytes = b"weights") -> Path:
    path = run.folder / "checkpoints" / f"step={step:08d}.ckpt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    mark_complete(path)
    return path


def _with(section, **options):
    return section | {"init_args": section["init_args"] | options}


def test_fingerprint_ignores_where_and_how_long_but_not_what():
    config = {
        "model": {"a": 1},
        "data": {},
        "seed_everything": 0,
        "trainer": {"max_steps": 3, "precision": 32},
    }
    longer = config | {"trainer": {"max_steps": 9, "precision": 32, "devices": 8, "log_every_n_steps": 2}}
    other = config | {"trainer": {"max_steps": 3, "precision": "bf16-mixed"}}
    assert fingerprint(config) == fingerprint(longer)
    assert fingerprint(config) != fingerprint(other)
    assert fingerprint(config) != fingerprint(config | {"model": {"a": 2}})
    model, data = ({"class_path": "x", "init_args": {"a": 1}} for _ in range(2))
    tested = {"model": _with(model, max_new_tokens=0), "data": _with(data, test="rows.parquet")}
    assert fingerprint(config | {"model": model, "data": data}) == fingerprint(config | tested)
    assert fingerprint(config | tested) != fingerprint(config | tested | {"data": _with(data, train="rows.parquet")})


def test_differences_name_each_leaf():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


def test_newest_unfinished_run_of_this_config_is_found(tmp_path):
    first, second = new_run(tmp_path, "x"), new_run(tmp_path, "x")
    other = new_run(tmp_path, "y")
    assert (first.number, second.number, other.number) == (0, 1, 2)
    assert unfinished_run(tmp_path, "x") == second
    second.write(status="finished")
    assert unfinished_run(tmp_path, "x") is None, "a finished run is left alone, and no older one is dug up"


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path):
    run = new_run(tmp_path, "x")
    good, bad = checkpoint(run, 100), checkpoint(run, 200)
    content = bytearray(bad.read_bytes())
    content[3] ^= 1
    bad.write_bytes(content)
    path, complaints = run.intact_checkpoint()
    assert path == good
    assert len(complaints) == 1
    assert "step=00000200.ckpt is damaged" in complaints[0]
    set_aside(bad)
    assert run.checkpoints() == [good]
    assert bad.with_name(bad.name + ".damaged").exists()


def test_unfinished_checkpoint_does_not_count(tmp_path):
    run = new_run(tmp_path, "x")
    path = run.folder / "checkpoints" / "step=00000001.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"half")
    assert damage(path) == "was not finished"
    with pytest.raises(ValueError, match="no checkpoint of .* is intact"):
        run.intact_checkpoint()


def test_sharded_checkpoint_with_a_missing_file_is_damaged(tmp_path):
    run = new_run(tmp_path, "x")
    folder = run.folder / "checkpoints" / "step=00000001.ckpt"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        (folder / name).write_text(name)
    mark_complete(folder)
    assert damage(folder) is None
    (folder / ".metadata").write_text("a pickle")
    assert damage(folder) == "holds .metadata, which was not saved with it"
    (folder / ".metadata").unlink()
    (folder / "b").unlink()
    assert damage(folder) == "lacks b"


def test_newest_checkpoint_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="train first with fit"):
        newest_checkpoint(tmp_path)
    new_run(tmp_path, "x")
    with pytest.raises(ValueError, match="holds no run"):
        newest_checkpoint(tmp_path)
    run = new_run(tmp_path, "y")
    path = checkpoint(run, 7)
    new_run(tmp_path, "z")
    assert newest_checkpoint(tmp_path) == (run, path)


def test_live_lock_refuses_and_dead_one_is_taken_over(tmp_path):
    run = new_run(tmp_path, "x")
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = {"host": __import__("socket").gethostname(), "process": sleeper.pid}
    path = run.folder / "lock.json"
    path.write_text(json.dumps(holder))
    with pytest.raises(ValueError, match=f"in use by process {sleeper.pid}"):
        Lock(run)
    sleeper.kill()
    sleeper.wait()
    lock = Lock(run)
    lock.release()
    assert not path.exists()


def test_lock_of_another_host_counts_while_its_heart_beats(tmp_path):
    run = new_run(tmp_path, "x")
    path = run.folder / "lock.json"
    path.write_text(json.dumps({"host": "elsewhere", "process": 1}))
    with pytest.raises(ValueError, match="elsewhere"):
        Lock(run)
    old = time.time() - 120
    os.utime(path, (old, old))
    Lock(run).release()
