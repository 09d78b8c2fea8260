"""A student whose tokens are merges of its teacher's pieces, from the rows to the exported model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import _dense
from test_cli import scalars
from test_two_ranks import launch, sharded, write

from agri_moe.cli import main
from agri_moe.data.chat import DEFAULT_FORMAT, Chat, ChatFormat, Segment
from agri_moe.data.merged_tokens import MergedTokens, same_bytes
from agri_moe.data.merges import PIECES_FILE
from agri_moe.data.packing import PackedRow, StepTotals, collate
from agri_moe.data.synthetic import make_rows, write_corpus
from agri_moe.data.teacher_view import TeacherView
from agri_moe.losses import align_attention
from agri_moe.models.causal import CausalModel, Reads
from agri_moe.models.source import ModelConfig, check_vocabulary, untrained_tokens
from agri_moe.models.upcycle import UpcycleSpec
from agri_moe.objective import CKA, KL, Attention, CrossEntropy, Objective
from agri_moe.schedules import Moment
from agri_moe.teacher import OnlineTeacher

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """corpus/ with a tokenizer that knows little Hindi, extended/ with more, dense/ and teacher/ with the former."""
    folder = tmp_path_factory.mktemp("merged")
    write_corpus(folder / "corpus", train_rows=120, validation_rows=24, seed=0, vocab_size=340)
    source, rows = str(folder / "corpus" / "tokenizer"), str(folder / "corpus" / "train.parquet")
    main(["tokens", "--source", source, "--input", rows, "--pieces", "150", "--output", str(folder / "extended")])
    _dense(folder / "dense", folder / "corpus")
    _dense(folder / "teacher", folder / "corpus", hidden_size=48, num_hidden_layers=3)
    (folder / "teacher" / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="module")
def chat(home) -> Chat:
    return Chat.load(str(home / "extended"))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [*make_rows(8, seed=3, split="validation"), {"scenario": "क\u093c़ फ़सल — wheat's", "advisory": "  धान\nकी "}]


def spelled(chat: Chat, token: int) -> tuple[int, ...]:
    return chat.merged.get(token, (token,))


# ---------------------------------------------------------------------- tokens


def test_the_table_travels_with_the_tokenizer(home, chat, tmp_path):
    table = json.loads((home / "extended" / "pieces.json").read_text())["pieces"]
    assert {int(token): tuple(pieces) for token, pieces in table.items()} == chat.merged
    assert len(chat.merged) == 150
    chat.save(tmp_path)
    assert Chat.load(str(tmp_path)).merged == chat.merged
    sizes = chat.token_bytes
    assert all(sizes[token] == sum(sizes[piece] for piece in pieces) for token, pieces in chat.merged.items())


def test_format_and_pieces_come_from_the_hub_with_the_tokenizer(home, chat, tmp_path, monkeypatch):
    """As the hub's client keeps them: a repository's revisions, told by names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--farm--advisor"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    spoken = Chat.load(str(home / "extended"), ChatFormat(default_system="किसान की बात सुनिए।"))
    spoken.save(repository / "snapshots" / "abc")
    shutil.copy(home / "dense" / "config.json", repository / "snapshots" / "abc")
    loaded = Chat.load("farm/advisor")
    assert loaded.format == spoken.format
    assert loaded.merged == chat.merged
    (repository / "snapshots" / "abc" / PIECES_FILE).unlink()
    (repository / "snapshots" / "abc" / "chat_format.json").unlink()
    assert Chat.load("farm/advisor").format == DEFAULT_FORMAT


def test_bytes_of_tokens_add_up_to_the_text(chat, rows):
    for row in rows:
        encoded = chat.encode(row)
        text = sum(chat.token_bytes[i] for i in encoded.input_ids)
        markers = sum(len(chat.tokenizer.convert_ids_to_tokens(i)) for i in encoded.input_ids if i in chat.control_ids)
        assert text + markers == len(chat.normalized(chat.render(row)).encode())


def test_other_markers_need_another_extension(home):
    from agri_moe.data.chat import ChatFormat

    with pytest.raises(ValueError, match="extended by `tokens` with other markers than <|question|>"):
        Chat.load(str(home / "extended"), ChatFormat(user="<|question|>"))


def test_places_in_the_order_of_pieces_by_brute_force():
    merged = {10: (1, 2), 11: (4, 1), 12: (1, 2, 3), 13: (1, 5), 14: (1, 2, 3, 3), 15: (1, 2)[::-1]}
    tokens = MergedTokens(merged)
    targets, at = torch.tensor([12, 3, 10, 15, 14]), torch.tensor([7, 8, 20, 30, 40])
    found = tokens.select(targets, at)
    rank = dict(zip(merged, found["merged_rank"].tolist(), strict=True))
    assert sorted(merged, key=merged.__getitem__) == sorted(merged, key=rank.__getitem__)
    assert [found["merged_first"][g].item() for g in found["merged_group"]] == [p[0] for p in merged.values()]
    for i, target in enumerate(targets.tolist()):
        own = merged.get(target, (target,))
        inside = {t for t in merged if found["merged_begin"][i] <= rank[t] < found["merged_end"][i]}
        expected = {t for t, pieces in merged.items() if len(own) > 1 and pieces[: len(own)] == own}
        assert inside == expected
        assert found["merged_next_first"][i] == own[0]
        places = [p for p in found["rest_places"][i].tolist() if p < len(found["rest_positions"])]
        assert found["rest_targets"][places].tolist() == list(own[1:])
        assert found["rest_positions"][places].tolist() == [int(at[i]) + k for k in range(1, len(own))]


# ---------------------------------------------------------------------- alignment


@pytest.mark.parametrize("view", ["same", "native", "no_thought"])
def test_a_token_is_matched_where_the_teacher_has_its_pieces(home, chat, rows, view):
    """Whatever stands before it is as many bytes of the same text for both."""
    reads = TeacherView(str(home / "teacher"), view, 0.0)
    theirs = reads.chat(chat.format).tokenizer
    matched = merged = answer = aligned = 0
    for row in rows:
        ours, read = chat.encode(row), reads.encode(chat, row)
        answer, aligned = answer + read.answer, aligned + read.aligned
        assert len(read.tokens) == len(ours.input_ids)
        for i, j in enumerate(read.tokens):
            if j < 0:
                continue
            pieces = spelled(chat, ours.input_ids[i])
            assert tuple(read.input_ids[j : j + len(pieces)]) == pieces
            if ours.segment_ids[i] == Segment.ASSISTANT and ours.input_ids[i] not in chat.control_ids:
                end = len(ours.input_ids) - 1
                before = chat.tokenizer.decode(ours.input_ids[i:end]).rstrip()
                after = (
                    theirs.decode(read.input_ids[j:]).replace("<|im_end|>", "").replace("<|endoftext|>", "").rstrip()
                )
                assert before == after, "the same text is still to come"
            matched, merged = matched + 1, merged + (len(pieces) > 1)
    assert merged > 100
    assert aligned / answer > 0.95


def test_boundaries_that_the_teacher_does_not_share_match_nothing():
    merged, sizes = {10: (1, 2), 11: (3, 1)}, {1: 1, 2: 2, 3: 1, 4: 2, 10: 3, 11: 2}
    assert same_bytes([10, 3, 1], [1, 2, 3, 1], merged, sizes) == {0: 0, 1: 2, 2: 3}
    assert same_bytes([10, 11], [1, 2, 4], merged, sizes) == {0: 0}, "the same bytes, in other pieces"
    assert same_bytes([3, 10], [4, 2], merged, sizes) == {}, (
        "a token that ends inside of theirs, and one that begins so"
    )
    assert same_bytes([2, 10, 3], [2, 1, 2, 3], merged, sizes, begins=(2, 2), kept=(0, 3)) == {1: 1}


def test_nobody_reads_other_ids_where_the_tokenizers_are_one(home, chat, tmp_path):
    plain = Chat.load(str(home / "corpus" / "tokenizer"))
    assert TeacherView(str(home / "teacher"), "same").of(plain) is None
    assert TeacherView(str(home / "teacher"), "same").of(chat) is not None
    knows = _dense(tmp_path / "knows", home / "corpus", vocab_size=640)
    chat.save(knows)
    assert TeacherView(str(knows), "same").of(chat) is None, "a teacher that has learned them reads them"
    (home / "teacher" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(ValueError, match=r"has no tokenizer.json: a student with merged tokens"):
            TeacherView(str(home / "teacher"), "same").of(chat)
    finally:
        (tmp_path / "tokenizer.json").rename(home / "teacher" / "tokenizer.json")


def test_a_teacher_of_another_tokenizer_is_refused(home, chat, tmp_path):
    write_corpus(tmp_path / "corpus", train_rows=40, validation_rows=8, seed=5, vocab_size=360)
    other = _dense(tmp_path / "other", tmp_path / "corpus")
    with pytest.raises(ValueError, match="extended from another tokenizer than that of model.teacher.source"):
        TeacherView(str(other), "same").of(chat)


# ---------------------------------------------------------------------- embeddings


def test_new_rows_are_the_mean_of_their_pieces(home, chat):
    config = ModelConfig(str(home / "dense"))
    new = untrained_tokens(str(home / "dense"), chat)
    assert new.keys() == chat.merged.keys() | (chat.control_ids - {chat.end_id})
    model = config.load("model.student", chat)
    plain = ModelConfig(str(home / "dense")).load("model.student", Chat.load(str(home / "corpus" / "tokenizer")))
    old = plain.get_input_embeddings().weight
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] % 128 == 0
    assert weight.shape[0] > max(chat.merged)
    for token, pieces in chat.merged.items():
        torch.testing.assert_close(weight[token], old[list(pieces)].mean(0))
    last = min(chat.merged)
    torch.testing.assert_close(weight[:last], old[:last])
    check_vocabulary(str(home / "dense"), plain.config, chat, "model.student.source")


@pytest.mark.parametrize("tied", [True, False])
def test_upcycle_writes_what_a_run_would_begin_with(home, chat, tmp_path, tied, capsys):
    source = _dense(tmp_path / "dense", home / "corpus", tie_word_embeddings=tied)
    jitter = "0" if tied else "0.01"  # without any, the audit asks for the source's own logits
    options = ["--num_experts", "4", "--jitter", jitter, "--tokenizer", str(home / "extended")]
    main(["upcycle", "--source", str(source), "--output", str(tmp_path / "moe"), *options])
    spec = UpcycleSpec(num_experts=4, jitter=float(jitter))
    ours = ModelConfig(str(source), spec).load("model.student", chat)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    written = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["vocab_size"] == written.get_input_embeddings().weight.shape[0] == ours.config.vocab_size
    state = ours.state_dict()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert len(written.get_input_embeddings().weight) > 1 + max(chat.merged), "rows that fill the matrix up, too"
    plain = AutoModelForCausalLM.from_pretrained(source).state_dict()
    token, pieces = max(chat.merged.items(), key=lambda item: len(item[1]))
    for name, lean in (("model.embed_tokens.weight", 0 if tied else 1), ("lm_head.weight", 0 if tied else -1)):
        weights = [math.exp(lean * place) for place in range(len(pieces))]
        expected = sum(w / sum(weights) * plain[name][piece] for w, piece in zip(weights, pieces, strict=True))
        torch.testing.assert_close(state[name][token], expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    text = "धान की फसल में झुलसा रोग"
    assert tokenizer.encode(text, add_special_tokens=False) == chat.encode_text(text)
    assert Chat.load(str(tmp_path / "moe")).merged == chat.merged
    assert untrained_tokens(str(tmp_path / "moe"), chat) == {}
    text = tmp_path / "text.txt"
    text.write_text("\n".join(row["advisory"] for row in make_rows(5, seed=9, split="validation")), encoding="utf-8")
    main(["audit", "--student", str(tmp_path / "moe"), "--source", str(source), "--text", str(text)])
    said = capsys.readouterr().out
    told = [float(line.split()[-4]) for line in said.splitlines() if "bits per byte" in line]
    lines = text.read_text().splitlines()
    expected = [plain_bits(tmp_path / "moe", lines), plain_bits(source, lines)]
    assert told == pytest.approx(expected, abs=2e-4)


def plain_bits(folder: Path, lines: list[str]) -> float:
    """A line at a time, through plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    for line in lines:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(line, add_special_tokens=False)]])
        with torch.no_grad():
            nats += float(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
    return nats / math.log(2) / sum(len(line.encode()) for line in lines)


def test_a_model_that_does_not_tell_its_tokenizer_is_refused(home, chat, tmp_path):
    source = _dense(tmp_path / "dense", home / "corpus")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match="nobody knows whether it has learned the merged tokens"):
        untrained_tokens(str(source), chat)


# ---------------------------------------------------------------------- the objective, from the rows on


def packed(chat: Chat, view: TeacherView, rows: list[dict[str, Any]]) -> list[PackedRow]:
    made = []
    for i, row in enumerate(rows):
        read = view.encode(chat, row)
        made.append(PackedRow(i, *map(np.array, (*chat.encode(row), read.input_ids, read.tokens))))
    return made


def batch_of(chat: Chat, sequences: list[list[PackedRow]], objective: Objective) -> dict[str, torch.Tensor]:
    from agri_moe.data.packing import count_targets

    flat = [row for rows in sequences for row in rows]
    counts = sum(
        count_targets(r.input_ids.tolist(), r.segment_ids.tolist(), chat.control_ids, r.teacher_tokens.tolist())
        for r in flat
    )
    totals = StepTotals(counts, sum(len(r.input_ids) for r in flat), len(sequences))
    batch = collate(sequences, totals, 4096, chat.pad_id)
    return batch | objective.select(batch, sorted(chat.control_ids), MergedTokens(chat.merged))


@pytest.fixture(scope="module")
def models(home, chat):
    student = ModelConfig(str(home / "dense")).load("model.student", chat)
    view = TeacherView(str(home / "teacher"), "same")
    teacher = ModelConfig(str(home / "teacher")).load("model.teacher", view.chat(chat.format))
    with torch.no_grad():  # random models say nearly the same of every token
        for model in (student, teacher):
            model.get_input_embeddings().weight.mul_(20)
    return student.double(), teacher.double()


@pytest.mark.parametrize("view", ["same", "native"])
def test_loss_and_gradient_from_packed_rows_are_those_of_an_enumeration(home, chat, rows, models, view):
    """Each row by itself through plain transformers, probabilities added up token by token."""
    student, teacher = models
    reads = TeacherView(str(home / "teacher"), view, 0.0)
    objective = Objective(ce=CrossEntropy(weight=0.0), kl=KL(weight=1.0))
    made = packed(chat, reads, rows[:4])
    batch = batch_of(chat, [made[:3], made[3:]], objective)
    online, width = OnlineTeacher(CausalModel(teacher), min(chat.merged)), min(chat.merged)
    signal = online.signal(batch, Reads())
    model = CausalModel(student)

    def read(hidden, head):
        return objective.logit_loss(hidden, head, batch, signal, now=Moment(), running={})

    student.zero_grad()
    found = model(batch, batch["positions"], read).read
    found.loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}

    first = {b: [u for u in range(max(chat.merged) + 1) if spelled(chat, u)[0] == b] for b in range(width)}
    total, count = torch.zeros((), dtype=torch.float64), 0
    student.zero_grad()
    for row in made:
        theirs = torch.tensor(row.teacher_ids)[None]
        with torch.no_grad():
            log_p = teacher(input_ids=theirs, use_cache=False).logits[0, :, :width].log_softmax(-1)
        q = student(input_ids=torch.tensor(row.input_ids)[None], use_cache=False).logits[0].softmax(-1)
        for t in range(len(row.input_ids) - 1):
            target, j = int(row.input_ids[t + 1]), int(row.teacher_tokens[t + 1])
            if row.segment_ids[t + 1] != Segment.ASSISTANT or target in chat.control_ids or j < 1:
                continue
            by_piece = torch.stack([q[t, first[b]].sum() for b in range(width)])
            by_piece = by_piece / by_piece.sum()
            total = total + F.kl_div(by_piece.log(), log_p[j - 1], reduction="sum", log_target=True)
            pieces = spelled(chat, target)
            if len(pieces) > 1:
                inside = [u for u in chat.merged if chat.merged[u][: len(pieces)] == pieces]
                p = sum(log_p[j - 1 + k, piece] for k, piece in enumerate(pieces)).exp()
                s = q[t, inside].sum()
                total = total + p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()
            count += 1
    (total / count).backward()
    assert count > 60
    torch.testing.assert_close(found.kl_sum.double(), total.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss.double(), (total / count).detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_packing_changes_nothing(home, chat, rows, models):
    student, teacher = models
    reads = TeacherView(str(home / "teacher"), "same")
    objective = Objective(ce=CrossEntropy(weight=0.5), kl=KL(weight=1.0))
    made = packed(chat, reads, rows[:4])
    losses = []
    for sequences in ([made], [[row] for row in made]):
        batch = batch_of(chat, sequences, objective)
        signal = OnlineTeacher(CausalModel(teacher), min(chat.merged)).signal(batch, Reads())

        def read(hidden, head, batch=batch, signal=signal):
            return objective.logit_loss(hidden, head, batch, signal, now=Moment(), running={})

        losses.append(CausalModel(student)(batch, batch["positions"], read).read)
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    torch.testing.assert_close(losses[0].kl_sum, losses[1].kl_sum)


def test_streams_are_compared_and_attention_added_up_where_the_text_is_the_same(home, chat, rows):
    reads = TeacherView(str(home / "teacher"), "same")
    objective = Objective(
        ce=CrossEntropy(), kl=KL(1.0), cka=CKA(weight=1.0, sample_tokens=64), attention=Attention(weight=1.0, queries=4)
    )
    made = packed(chat, reads, rows[:2])
    batch = batch_of(chat, [made], objective)
    ours, theirs = batch["input_ids"].flatten().tolist(), batch["teacher_input_ids"].flatten().tolist()
    for here, there in zip(batch["sample"].tolist(), batch["teacher_sample"].tolist(), strict=True):
        starts = [
            max(i for i in range(at + 1) if not positions[i])
            for at, positions in (
                (here, batch["position_ids"].flatten().tolist()),
                (there, batch["teacher_position_ids"].flatten().tolist()),
            )
        ]
        said = [i for token in ours[starts[0] : here + 1] for i in spelled(chat, token)]
        decode = chat.tokenizer.decode
        assert decode(said) == decode(theirs[starts[1] : there + 1]), "as much of the text is read"
    keys = batch["key_tokens"]
    for t, token in enumerate(ours):
        at = [u for u in keys[0, t].tolist() if u >= 0]
        if at:
            assert tuple(theirs[u] for u in at) == spelled(chat, token)
    uniform = torch.full((1, 1, 1, len(theirs)), 1.0)
    aligned = align_attention(uniform, keys)[0, 0, 0].tolist()
    assert aligned == [float(sum(u >= 0 for u in places)) for places in keys[0].tolist()]
    assert max(aligned) > 1


# ---------------------------------------------------------------------- a run


@pytest.fixture
def config(home, tmp_path) -> Path:
    settings = {
        "seed_everything": 0,
        "model": {
            "class_path": "DistillModule",
            "init_args": {
                "student": {"source": str(home / "dense"), "upcycle": {"num_experts": 4}},
                "teacher": {"source": str(home / "teacher"), "dtype": "float32"},
                "objective": {
                    "ce": {"weight": 0.5},
                    "kl": {"weight": 1.0},
                    "cka": {"weight": 0.1, "sample_tokens": 64},
                    "attention": {"weight": 0.1},
                },
                "learning_rate": 1e-2,
                "optimizer": {"warmup_steps": 1},
            },
        },
        "data": {
            "class_path": "ChatDataModule",
            "init_args": {
                "train": str(home / "corpus" / "train.parquet"),
                "validation": str(home / "corpus" / "validation.parquet"),
                "tokenizer": str(home / "extended"),
                "max_length": 768,
                "tokens_per_batch": 1536,
                "cache_dir": str(tmp_path / "cache"),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
            "max_steps": 6,
            "num_sanity_val_steps": 0,
            "check_val_every_n_epoch": None,
            "val_check_interval": 3,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "agri_moe.callbacks.resume.Checkpoint", "init_args": {"every_n_steps": 3}}],
        },
    }
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_from_fit_to_an_answer(home, chat, config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(config)])
    run = tmp_path / "lightning_logs" / "version_0"
    logged = scalars(run)
    for name in ("train/kl", "train/ce", "train/cka", "train/attention", "val/kl", "val/bits_per_byte"):
        assert all(math.isfinite(value) for _, value in logged[name]), name
    assert logged["train/kl"][-1][1] < logged["train/kl"][0][1]
    assert logged["val/bits_per_byte"][-1][1] < logged["val/bits_per_byte"][0][1]
    assert logged["val/aligned"][-1][1] > 0.95
    main(["export", "--output", "advisor", "--dtype", "float32"])
    main(["generate", "--model", "advisor", "--scenario", "फसल: धान", "--max_new_tokens", "8"])
    assert Chat.load(str(tmp_path / "advisor")).merged == chat.merged
    main(["preview", "--config", str(config), "--rows", "1", "--color", "false"])
    assert "teacher, same:" in capsys.readouterr().out


def test_a_cached_teacher_teaches_the_same(home, config, tmp_path):
    """All of its pieces kept: what is left is the rounding of the cache."""
    options = ["--model.objective.cka.weight=0", "--model.objective.attention.weight=0"]
    main(["cache", "--config", str(config), *options, "--output", str(tmp_path / "cached"), "--k", "600"])
    one_step = ["fit", "--config", str(config), *options, "--trainer.max_steps=1"]
    main(one_step)
    main([*one_step, f"--model.teacher.cache={tmp_path / 'cached'}"])
    online, cached = (scalars(tmp_path / "lightning_logs" / f"version_{i}") for i in (0, 1))
    assert cached["train/ce"] == online["train/ce"]
    assert cached["train/kl"][0][1] == pytest.approx(online["train/kl"][0][1], abs=2e-3)


def test_two_sharded_ranks_train_as_one(config, tmp_path):
    """New rows begin in pieces; each rank asks the teacher about the pieces of its own rows."""
    settings = yaml.safe_load(config.read_text())
    objective = {"ce": {"weight": 0.5}, "kl": {"weight": 1.0}, "balance": {"weight": 0.0}}  # sums over tokens
    settings["model"]["init_args"] |= {"objective": objective, "learning_rate": 1e-3}
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    main(["fit", "--config", str(write(tmp_path / "one.yaml", settings, 3072))])
    launch(write(tmp_path / "two.yaml", settings, 1536, **sharded(2)))
    one, two = (scalars(tmp_path / name / "lightning_logs" / "version_0") for name in ("one", "two"))
    for tag in ("train/ce", "train/kl", "val/ce", "val/kl", "val/bits_per_byte", "val/aligned"):
        assert [step for step, _ in two[tag]] == [step for step, _ in one[tag]]
        assert [v for _, v in two[tag]] == pytest.approx([v for _, v in one[tag]], rel=2e-4), tag
    assert two["train/ce"][0][1] == pytest.approx(one["train/ce"][0][1], rel=1e-6), "the same rows to begin with"


def test_documents_have_no_teacher_in_other_tokens(home, config, tmp_path, capsys):
    from test_cli import refused

    settings = yaml.safe_load(config.read_text())
    text = tmp_path / "text.txt"
    text.write_text("".join(f"धान की फसल {i}\n" for i in range(50)), encoding="utf-8")
    options = {"train": str(text), "tokenizer": str(home / "extended"), "block_size": 64, "tokens_per_batch": 512}
    settings["data"] = {"class_path": "agri_moe.data.text_data.TextDataModule", "init_args": options}
    config.write_text(yaml.safe_dump(settings))
    assert "only ChatDataModule has" in refused(capsys, "fit", "--config", config)
