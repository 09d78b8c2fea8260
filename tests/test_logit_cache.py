"""The cache on disk: numbers to bytes and back, rows found by what they hold, and folders that are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agri_moe.data.logit_cache import (
    MANIFEST,
    UNFINISHED,
    Answers,
    Header,
    LogitCache,
    decode,
    encode,
    finish,
    row_key,
    shard_name,
    to_arrays,
    write_shard,
)
from agri_moe.losses import entropy, most_probable, sampled_counts

HEADER = Header(
    kind="topk",
    tokens=5,
    seed=0,
    vocabulary=40,
    segments=["assistant"],
    view="same",
    teacher="t",
    teacher_source="somewhere",
    dtype="float32",
    tokenizer="a",
    template="b",
    rows="c",
)


def answers_of(logits, kind, tokens, seed=0):
    """What is kept of [N, W] logits, as float64 numbers would have it."""
    log_p = torch.as_tensor(logits).double().log_softmax(-1)
    log_probs = counts = log_tail = None
    if kind == "topk":
        ids, log_probs, log_tail = most_probable(log_p, tokens)
    else:
        ids, counts = sampled_counts(log_p, tokens, torch.Generator().manual_seed(seed))
    positions = np.random.default_rng(seed).permutation(10 * len(log_p))[: len(log_p)]
    fields = (ids, log_probs, counts, log_tail, entropy(log_p), log_p.argmax(-1) if kind == "sampled" else ids[:, 0])
    return Answers(np.sort(positions), *(None if f is None else f.numpy() for f in fields)), log_p


def through_bytes(answers, kind, tokens):
    """As the middle one of three rows in a block."""
    n = len(answers.positions_N)
    first, last = answers.select(slice(0, n // 2)), answers.select(slice(n // 3, n))
    total = n // 2 + n + len(last.positions_N)
    return decode(encode([first, answers, last]), kind, total, tokens, slice(n // 2, n // 2 + n))


@settings(max_examples=60, deadline=None)
@given(
    positions=st.integers(0, 9),
    width=st.sampled_from([2, 7, 300, 70_000]),
    k=st.integers(1, 12),
    spread=st.sampled_from([0.0, 1.0, 8.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_topk_within_two_hundredths_of_a_nat(positions, width, k, spread, seed):
    k = min(k, width)
    logits = np.random.default_rng(seed).standard_normal((positions, width)) * spread
    answers, log_p = answers_of(logits, "topk", k)
    back = through_bytes(answers, "topk", k)
    assert (back.positions_N == answers.positions_N).all()
    assert (back.top_N == answers.ids_NK[:, 0]).all()
    assert np.abs(back.entropy_N - answers.entropy_N).max(initial=0) < 0.001
    order = answers.ids_NK.argsort(1)
    assert (back.ids_NK == np.take_along_axis(answers.ids_NK, order, 1)).all()

    arrays = to_arrays(back)
    total = arrays.probs_MK.sum(1) + arrays.tail_M
    assert np.allclose(total, 1.0, atol=1e-5)
    for row in range(positions):
        kept = dict(zip(arrays.ids_MK[row][::-1].tolist(), arrays.probs_MK[row][::-1].tolist(), strict=True))
        assert set(kept) == set(answers.ids_NK[row].tolist())
        assert log_p[row, arrays.ids_MK[row, 0]] == log_p[row].max()
        for token, p in kept.items():
            if log_p[row, token] > -80:  # what float32 can hold
                assert abs(np.log(p) - log_p[row, token].item()) <= 0.0201
        tail = 1 - sum(log_p[row, list(kept)].exp().tolist())
        if k == width:
            assert arrays.tail_M[row] == 0
        elif tail > 1e-12:
            assert abs(np.log(arrays.tail_M[row]) - answers.log_tail_N[row]) <= 0.0201


@settings(max_examples=40, deadline=None)
@given(
    positions=st.integers(0, 9),
    width=st.sampled_from([2, 300, 70_000]),
    draws=st.integers(1, 60),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_samples_come_back_exactly(positions, width, draws, spread, seed):
    logits = np.random.default_rng(seed).standard_normal((positions, width)) * spread
    answers, log_p = answers_of(logits, "sampled", draws, seed)
    back = through_bytes(answers, "sampled", draws)
    arrays = to_arrays(back)
    assert arrays.tail_M is None
    for row in range(positions):
        drawn = {t: c for t, c in zip(answers.ids_NK[row], answers.counts_NK[row], strict=True) if c}
        assert sum(drawn.values()) == draws
        pairs = zip(arrays.ids_MK[row], arrays.probs_MK[row], strict=True)
        got = {t: round(float(p) * draws) for t, p in pairs if p}
        assert got == drawn
        assert arrays.ids_MK[row, 0] == log_p[row].argmax()


def test_draws_follow_the_distribution():
    log_p = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log().repeat(4000, 1)
    ids, counts = sampled_counts(log_p, 10, torch.Generator().manual_seed(0))
    share = torch.zeros(4).scatter_add_(0, ids.flatten(), counts.flatten().float()) / 40_000
    error = (share * (1 - share) / 40_000).sqrt()
    assert ((share - log_p[0].exp()).abs() < 4 * error).all()
    assert (counts.sum(1) == 10).all()
    for row, n in zip(ids[:50].tolist(), (counts[:50] > 0).sum(1).tolist(), strict=True):
        assert len(set(row[:n])) == n


def test_rows_are_found_by_tokens_and_segments():
    key = row_key([1, 2, 3], [4, 4, 4])
    assert key == row_key(np.array([1, 2, 3], dtype=np.int32), np.array([4, 4, 4], dtype=np.int8))
    assert key != row_key([1, 2, 3], [4, 4, 3])
    assert key != row_key([1, 2, 4], [4, 4, 4])
    assert 0 <= key < 2**64


# ---------------------------------------------------------------------- size


def bytes_per_position(path, kind, tokens):
    """Of rows of 100 positions, headers and offsets counted; the best of independent logits are any ids."""
    torch.manual_seed(0)
    answers, _ = answers_of(2 * torch.randn(400, 151_936), kind, tokens)
    write_shard(path, kind, [(i, answers.select(slice(100 * i, 100 * i + 100))) for i in range(4)])
    return path.stat().st_size / 400


def test_fifty_of_any_ids_take_at_most_140_bytes(tmp_path):
    assert bytes_per_position(tmp_path / "shard", "topk", 50) <= 140


def test_twelve_samples_of_any_ids_take_at_most_40_bytes(tmp_path):
    assert bytes_per_position(tmp_path / "shard", "sampled", 12) <= 40


# ---------------------------------------------------------------------- the folder


@pytest.fixture
def folder(tmp_path):
    """A small cache of two files, three rows each."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for number in range(2):
        rows = [(100 * number + i, answers_of(torch.randn(i + 1, 40), "topk", 5, seed=i)[0]) for i in range(3)]
        write_shard(folder / shard_name(number), "topk", rows)
    (folder / "00009.arrow.partial").write_text("left by a killed process")
    finish(folder, HEADER, 2)
    return folder


def test_rows_in_and_out(folder):
    cache = LogitCache(folder)
    assert not list(folder.glob("*.partial"))
    assert [key for key, _ in cache] == [0, 1, 2, 100, 101, 102]
    for key, answers in cache:
        own = cache.read(key)
        assert len(own.positions_N) == key % 100 + 1
        for a, b in zip(own, answers, strict=True):
            assert (a is None and b is None) or (a == b).all()
    assert cache.find(np.array([101, 7, 0], np.uint64))[:, 0].tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match="other rows"):
        cache.read(7)
    cache.check_rows(np.array([0, 102], np.uint64), "data.train")
    with pytest.raises(ValueError, match=r"other rows: 1 of the 2 of data.train .*row 1"):
        cache.check_rows(np.array([0, 103], np.uint64), "data.train")


def test_each_wrong_field_is_named(folder):
    cache = LogitCache(folder)
    cache.check(tokenizer="a", template="b", view="same", teacher="t")
    for name in ("tokenizer", "template", "view", "teacher"):
        with pytest.raises(ValueError, match=f"another {name}"):
            cache.check(**{name: "other"})


def test_damage_is_named(folder, tmp_path):
    def refused(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        with pytest.raises(ValueError, match="model.teacher.cache") as error:
            LogitCache(copy).verify()
        return str(error.value)

    def flip(copy):
        content = bytearray((copy / "00001.arrow").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "00001.arrow").write_bytes(content)

    def edit(**changes):
        def change(copy):
            manifest = json.loads((copy / MANIFEST).read_text()) | changes
            (copy / MANIFEST).write_text(json.dumps(manifest))

        return change

    def unfinished(copy):
        (copy / MANIFEST).rename(copy / UNFINISHED)

    assert "00001.arrow is damaged" in refused(flip)
    assert "00000.arrow is missing" in refused(lambda copy: (copy / "00000.arrow").unlink())
    assert "no manifest.json" in refused(lambda copy: (copy / MANIFEST).unlink())
    assert "unfinished" in refused(unfinished)
    assert "cannot be read" in refused(lambda copy: (copy / MANIFEST).write_text("{"))
    assert "cannot be read" in refused(lambda copy: (copy / MANIFEST).write_text("[]"))
    assert "format 2" in refused(edit(format=2))
    outside = {"../secret.arrow": {"bytes": 1, "sha256": ""}}
    assert "no file of a cache" in refused(edit(files=outside))
    assert "lacks the checksum" in refused(edit(files={"00000.arrow": {}}))
