import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agri_moe.runs import (
    Lock,
    Run,
    beside,
    check_room,
    commit,
    damage,
    differences,
    fingerprint,
    mark_complete,
    new_run,
    newest_checkpoint,
    remove_leftovers,
    replace_text,
    set_aside,
    storage_error,
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


def test_a_lock_that_cannot_be_read_counts_for_a_minute(tmp_path):
    run = new_run(tmp_path, "x")
    path = run.folder / "lock.json"
    for content in (b"", b"{", b"\xff\xfe", b"[]", b"{}", b"null"):  # as a full disk or another program may leave it
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            Lock(run)
    old = time.time() - 120
    os.utime(path, (old, old))
    Lock(run).release()


def test_process_ids_of_another_container_mean_nothing(tmp_path):
    run = new_run(tmp_path, "x")
    holder = {"host": __import__("socket").gethostname(), "machine": "another", "process": 2**22 + 1}
    (run.folder / "lock.json").write_text(json.dumps(holder))
    with pytest.raises(ValueError, match=f"in use by process {2**22 + 1}"):
        Lock(run)


def _take_over(folder, begin, end, taken):
    begin.wait()
    try:
        Lock(Run(folder))
        taken.put(True)
    except ValueError:
        taken.put(False)
    end.wait()


def test_of_many_that_take_over_a_dead_lock_at_the_same_moment_one_does(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        run = new_run(tmp_path, "x")
        (run.folder / "lock.json").write_text(json.dumps({"host": "gone", "process": 1}))
        os.utime(run.folder / "lock.json", (1, 1))
        begin, end, taken = context.Event(), context.Event(), context.Queue()
        others = [context.Process(target=_take_over, args=(run.folder, begin, end, taken)) for _ in range(4)]
        for process in others:
            process.start()
        begin.set()
        results = sorted(taken.get(timeout=30) for _ in others)
        end.set()
        for process in others:
            process.join()
        assert results == [False, False, False, True]


def test_who_stood_still_and_was_taken_over_saves_nothing_more(tmp_path):
    run = new_run(tmp_path, "x")
    lock = Lock(run)
    lock.check()
    theirs = {"host": "elsewhere", "process": 1}
    (run.folder / "lock.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="was taken over by another process"):
        lock.check()
    lock.release()
    assert json.loads((run.folder / "lock.json").read_text()) == theirs, "it is not ours to take away"


def test_a_heart_that_missed_a_beat_goes_on(tmp_path, monkeypatch):
    run, touched, beats = new_run(tmp_path, "x"), os.utime, []

    def utime(path):
        beats.append(path)
        if len(beats) == 1:
            raise OSError(errno.ESTALE, "Stale file handle")
        touched(path)

    monkeypatch.setattr("agri_moe.runs.HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr("agri_moe.runs.os.utime", utime)
    lock = Lock(run)
    until = time.monotonic() + 5
    while len(beats) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    lock.release()
    assert len(beats) >= 3


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_gets_its_name_when_it_is_whole(tmp_path, sharded):
    path = tmp_path / "step=00000001.ckpt"
    if sharded:
        beside(path).mkdir()
        (beside(path) / "a").write_bytes(b"weights")
    else:
        beside(path).write_bytes(b"weights")
    assert not path.exists()
    commit(path)
    assert damage(path) is None
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.complete"}


def test_what_died_in_a_save_is_cleared_away(tmp_path):
    whole = tmp_path / "step=00000001.ckpt"
    beside(whole).write_bytes(b"weights")
    commit(whole)
    before = {p.name for p in tmp_path.iterdir()}
    (tmp_path / "step=00000002.ckpt.partial").mkdir()
    (tmp_path / "step=00000002.ckpt.partial" / "a").write_bytes(b"half")
    (tmp_path / "step=00000002.ckpt.complete").write_text("{}")  # killed between the checksums and the name
    (tmp_path / "step=00000003.ckpt.complete.partial").write_text("{")
    remove_leftovers(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == before


def test_the_same_step_can_be_set_aside_twice(tmp_path):
    path = tmp_path / "step=00000001.ckpt"
    for content in (b"one", b"two"):
        path.mkdir()
        (path / "a").write_bytes(content)
        mark_complete(path)
        set_aside(path)
    assert (tmp_path / "step=00000001.ckpt.damaged" / "a").read_bytes() == b"two"
    assert len(list(tmp_path.iterdir())) == 1


def test_checksums_that_cannot_be_read_are_damage(tmp_path):
    path = tmp_path / "step=00000001.ckpt"
    path.write_bytes(b"weights")
    for content in (b"", b"[]", b"{}", b"\xff", b"7"):
        (tmp_path / "step=00000001.ckpt.complete").write_bytes(content)
        assert "cannot be read" in damage(path)


def test_room_is_asked_for_before_there_is_a_folder(tmp_path):
    check_room(tmp_path / "not" / "yet", 1, 2)
    with pytest.raises(ValueError, match="too little for two checkpoints of about 1e\\+09 GB each"):
        check_room(tmp_path / "not" / "yet", 10**18, 2)


def test_the_disks_complaint_is_found_behind_torchs():
    full = OSError(errno.ENOSPC, "No space left on device")

    class OfRanks(BaseException):
        failures = {1: (full, None)}  # noqa: RUF012

    for error in (full, OfRanks()):
        assert storage_error(error) is full
    behind = RuntimeError("unexpected pos 704 vs 598")
    behind.__context__ = full
    assert storage_error(behind) is full
    assert storage_error(RuntimeError("shapes differ")) is None


def test_a_text_without_room_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert path.read_text() == "old"
