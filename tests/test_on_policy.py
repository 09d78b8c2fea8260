"""The student's own text as a micro-batch: what it said, segmented and counted, and nothing else disturbed."""

import numpy as np
import pytest
import torch
import yaml
from test_cli import main, scalars
from transformers import AutoModelForCausalLM, AutoTokenizer

from agri_moe import on_policy
from agri_moe.data.chat import Chat, Segment, render_scenario
from agri_moe.data.packing import PackedRow, StepTotals, collate, count_targets
from agri_moe.data.synthetic import make_rows
from agri_moe.data.teacher_view import TeacherView
from agri_moe.generation import sample
from agri_moe.models.causal import CausalModel, Reads, start_rows
from agri_moe.models.distill import DistillModule
from agri_moe.models.source import StudentConfig
from agri_moe.models.upcycle import UpcycleSpec, load_upcycled
from agri_moe.objective import Objective
from agri_moe.on_policy import OnPolicy, as_written, check_on_policy, is_on_policy, read_prompts, sample_batch
from agri_moe.schedules import Moment
from agri_moe.teacher import OnlineTeacher, TeacherConfig
from agri_moe.terms import CKA, KL, CrossEntropy

LENGTH = 512
SHORT = OnPolicy(share=0.5, max_new_tokens=12, rows=5)


@pytest.fixture(scope="module")
def chat(corpus):
    return Chat.load(str(corpus / "tokenizer"))


@pytest.fixture(scope="module")
def texts():
    rows = make_rows(7, seed=3, split="train")
    rows[1] = rows[1] | {"thought": None}
    rows[2] = rows[2] | {"system": "संक्षेप में <|assistant|> उत्तर दें"}
    rows[3] = rows[3] | {"thought": f"\n{rows[3]['thought']}"}  # its newline may merge with the prompt's
    return rows


@pytest.fixture(scope="module")
def batch(chat, texts):
    encoded = [chat.encode(row) for row in texts]
    rows = [PackedRow(10 + i, np.array(e.input_ids), np.array(e.segment_ids)) for i, e in enumerate(encoded)]
    return collate([rows[:3], rows[3:6], rows[6:]], totals(chat, rows), 1024, chat.pad_id)


@pytest.fixture(scope="module")
def student(chat, dense):
    hf = load_upcycled(str(dense), UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.3), dtype=torch.float32)
    start_rows(hf, chat.new_marker_pieces)
    hf.config.use_cache = False
    hf.gradient_checkpointing_enable({"use_reentrant": False})
    return CausalModel(hf.train())


def totals(chat, rows, replicas=1) -> StepTotals:
    counts = [count_targets(r.input_ids, r.segment_ids, chat.control_ids) for r in rows]
    counts = np.sum(counts, axis=0) if counts else np.zeros((2, 5), dtype=np.int64)
    return StepTotals(counts * replicas, sum(len(r.input_ids) for r in rows) * replicas, replicas)


def unpack(batch) -> dict[int, tuple[list[int], list[int]]]:
    """Row id -> ids and segments."""
    found = {}
    for row_id in sorted(set(batch["row_ids"].flatten().tolist()) - {-1}):
        here = batch["row_ids"] == row_id
        found[row_id] = (batch["input_ids"][here].tolist(), batch["segment_ids"][here].tolist())
    return found


def write(student, chat, prompts, seed, config=SHORT):
    """What the student samples, without `sample_batch`."""
    student.hf.eval()
    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": config.temperature, "top_k": 0}
    limits = {"max_new_tokens": config.max_new_tokens, "batch_size": 99}
    written = list(sample(student.hf, prompts, end_ids=[chat.end_id], pad_id=chat.pad_id, **limits, **options))
    student.hf.train()
    return written


# ---------------------------------------------------------------------- which steps


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_share_of_steps(share):
    steps = [is_on_policy(share, step, seed=7) for step in range(10_000)]
    assert abs(np.mean(steps) - share) < (0.02 if 0 < share < 1 else 1e-12)
    assert steps[:200] == [is_on_policy(share, step, seed=7) for step in range(200)], "nothing but seed and step counts"
    if 0 < share < 1:
        assert steps[:200] != [is_on_policy(share, step, seed=8) for step in range(200)]
        both = np.mean(np.array(steps[1:]) & np.array(steps[:-1]))
        assert abs(both - share**2) < 0.02, "a step says nothing of the next"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"share": 1.5}, "share"),
        ({"temperature": 0.0}, "temperature"),
        ({"rows": 0}, "rows"),
        ({"max_new_tokens": 0}, "max"),
    ],
)
def test_settings_that_make_no_sense(options, told):
    with pytest.raises(ValueError, match=rf"model\.on_policy.*{told}"):
        OnPolicy(**options)


def test_a_sharded_student_is_refused():
    with pytest.raises(ValueError, match=r"model\.on_policy\.share is 0\.5.*sharded"):
        check_on_policy(SHORT, True)
    check_on_policy(SHORT, False)
    check_on_policy(OnPolicy(), True)


# ---------------------------------------------------------------------- prompts


def test_prompts_are_what_generation_starts_from(chat, texts, batch):
    prompts = read_prompts(batch, chat, 99)
    assert [prompt.row_id for prompt in prompts] == list(range(10, 17))
    for row, prompt in zip(texts, prompts, strict=True):
        thought = row["thought"] is not None
        assert prompt.input_ids == chat.encode_prompt(row["scenario"], row.get("system"), thought=thought)
        whole = chat.encode(row).segment_ids
        assert prompt.segment_ids[:-1] == whole[: len(prompt.input_ids) - 1]
        assert prompt.segment_ids[-1] == Segment.USER
    assert [p.row_id for p in read_prompts(batch, chat, 4)] == [10, 11, 12, 13]


def test_a_newline_that_merged_with_the_thought_is_given_back(chat):
    """As where `\\n\\n` is one token: it belongs to the thought, and the prompt still ends in a newline."""
    marker, newline = chat.marker_ids["thought"], chat.encode_text("\n")
    u, t = int(Segment.USER), int(Segment.THOUGHT)
    row = PackedRow(0, np.array([chat.marker_ids["user"], 300, marker, 301, 302]), np.array([u, u, u, t, t]))
    (prompt,) = read_prompts(collate([[row]], totals(chat, [row]), 64, chat.pad_id), chat, 8)
    assert prompt.input_ids == [chat.marker_ids["user"], 300, marker, *newline]
    assert prompt.segment_ids == [u] * 4


def test_texts_of_a_prompt_encode_to_the_prompt(chat, texts, batch):
    for prompt in read_prompts(batch, chat, 99):
        fields = on_policy.read_texts(chat, prompt.input_ids)
        thought = chat.marker_ids["thought"] in prompt.input_ids
        assert chat.encode_prompt(**fields, thought=thought) == prompt.input_ids
        assert fields["scenario"] == render_scenario(texts[prompt.row_id - 10]["scenario"])


# ---------------------------------------------------------------------- segments


def test_segments_are_those_of_the_encoder(chat, texts, batch):
    """A student that says what the data says makes the row of the data."""
    for row, prompt in zip(texts, read_prompts(batch, chat, 99), strict=True):
        whole = chat.encode(row)
        if whole.input_ids[: len(prompt.input_ids)] != prompt.input_ids:
            continue  # the merged newline
        written = as_written(chat, prompt, whole.input_ids[len(prompt.input_ids) :], LENGTH)
        assert written.input_ids.tolist() == whole.input_ids
        assert written.segment_ids.tolist() == whole.segment_ids


def test_samples_that_go_wrong_are_rows_all_the_same(chat, batch):
    thinking, short = read_prompts(batch, chat, 2)
    end, assistant = chat.end_id, chat.marker_ids["assistant"]
    t, a = int(Segment.THOUGHT), int(Segment.ASSISTANT)
    cases = [
        (thinking, [end], [t]),
        (thinking, [assistant], [t]),
        (thinking, [assistant, assistant, end], [t, a, a]),
        (thinking, [300, 301], [t, t]),
        (thinking, [], []),
        (short, [end], [a]),
        (short, [assistant, 300], [a, a]),
    ]
    for prompt, ids, expected in cases:
        row = as_written(chat, prompt, ids, LENGTH)
        assert row.input_ids.tolist() == prompt.input_ids + ids
        assert row.segment_ids.tolist() == prompt.segment_ids + expected
    cut = as_written(chat, thinking, [300] * 9, len(thinking.input_ids) + 4)
    assert len(cut.input_ids) == len(cut.segment_ids) == len(thinking.input_ids) + 4


# ---------------------------------------------------------------------- the micro-batch


def test_the_batch_is_what_the_student_said(chat, student, batch):
    prompts = read_prompts(batch, chat, SHORT.rows)
    expected = write(student, chat, [p.input_ids for p in prompts], seed=11)
    out = sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=11, replicas=6)
    got = unpack(out.batch)
    assert list(got) == [10, 11, 12, 13, 14]
    for prompt, ids in zip(prompts, expected, strict=True):
        assert got[prompt.row_id][0] == prompt.input_ids + ids
    assert out.tokens == sum(map(len, expected))
    assert out.seconds > 0
    rows = {p.row_id: as_written(chat, p, ids, LENGTH) for p, ids in zip(prompts, expected, strict=True)}
    by_hand = collate([[row] for row in rows.values()], totals(chat, list(rows.values()), 6), LENGTH, chat.pad_id)
    for name in ("step_targets", "step_tokens", "step_batches"):
        assert torch.equal(out.batch[name], by_hand[name])
    for name in ("position_ids", "target_ids", "target_segments", "segment_ids"):
        for row_id in rows:
            assert torch.equal(
                out.batch[name][out.batch["row_ids"] == row_id], by_hand[name][by_hand["row_ids"] == row_id]
            )
    assert out.batch.keys() == batch.keys()
    assert max(out.batch["input_ids"].shape) <= LENGTH


def test_reproducible_and_undisturbed(chat, student, batch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=s).batch for s in (1, 1, -2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert unpack(first) != unpack(other)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in student.modules())
    assert student.hf.config.use_cache is False
    assert all(layer.gradient_checkpointing for layer in student.hf.model.layers)
    assert all(p.grad is None for p in student.parameters())
    student.hf.eval()
    sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=1)
    assert not student.hf.training
    student.hf.train()


def test_restored_after_a_failure(chat, student, batch, monkeypatch):
    before = torch.get_rng_state()
    monkeypatch.setattr(student.hf, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=1)
    assert student.hf.training
    assert torch.equal(torch.get_rng_state(), before)


def test_each_token_costs_one_forward_pass_of_one_token(chat, student, batch, monkeypatch):
    widths = []
    hook = student.hf.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    sample_batch(batch, student, chat, OnPolicy(share=1, max_new_tokens=6, rows=2), LENGTH, None, seed=0)
    hook.remove()
    assert len(widths) <= 6
    assert set(widths[1:]) == {1}


def test_samples_follow_the_student_s_own_distribution(chat, student, batch, monkeypatch):
    """Whatever the generation config would cut off, at the temperature asked for."""
    config = student.hf.generation_config
    for name, value in {"top_k": 1, "top_p": 0.1, "repetition_penalty": 9.0}.items():
        monkeypatch.setattr(config, name, value, raising=False)
    warm = [unpack(sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=s).batch) for s in range(3)]
    assert warm[0] != warm[1] != warm[2]
    cold = OnPolicy(share=1, max_new_tokens=4, rows=3, temperature=1e-4)
    one, two = (unpack(sample_batch(batch, student, chat, cold, LENGTH, None, seed=s).batch) for s in range(2))
    assert one == two, "near temperature 0 sampling is greedy"


def test_a_batch_without_prompts(chat, student):
    text = PackedRow(0, np.arange(300, 320), np.full(20, int(Segment.ASSISTANT)))
    for rows in ([], [[text]]):
        empty = collate(rows, totals(chat, [text] if rows else []), 64, chat.pad_id)
        out = sample_batch(empty, student, chat, SHORT, LENGTH, None, seed=0, replicas=2)
        assert (out.batch["segment_ids"] == Segment.PAD).all()
        assert out.tokens == 0
        assert out.batch["step_targets"].sum() == 0
        assert out.batch["step_tokens"] == 0
        assert out.batch["step_batches"] == 2


def test_the_divergence_on_samples_has_a_gradient(chat, student, batch, teacher):
    """Through the objective, as a training step does it; the mean over the micro-batch's own tokens."""
    hf = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    start_rows(hf, chat.new_marker_pieces)
    frozen = OnlineTeacher(CausalModel(hf))
    segments = ["thought", "assistant"]
    objective = Objective(ce=CrossEntropy(weight=0.0, segments=segments), kl=KL(weight=1.0, segments=segments))
    made = sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=4, replicas=3).batch
    made |= objective.select(made, sorted(chat.control_ids))
    assert len(made["kl_targets"]) > 0
    signal = frozen.signal(made, Reads())

    def loss(made, replicas):
        def read(hidden, head):
            return objective.logit_loss(hidden, head, made, signal, now=Moment(replicas=replicas), running={})

        return student(made, made["positions"], read).read

    out = loss(made, 3)
    assert out.loss.item() == pytest.approx((out.kl_sum / len(made["kl_targets"])).item(), rel=1e-5)
    alone = made | sample_batch(batch, student, chat, SHORT, LENGTH, None, seed=4).batch
    assert loss(alone, 1).loss.item() == pytest.approx(out.loss.item(), rel=1e-6)
    out.loss.backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0
    student.zero_grad()


# ---------------------------------------------------------------------- another view


@pytest.fixture(scope="module")
def view(corpus, tmp_path_factory) -> TeacherView:
    """The same vocabulary under a template in Qwen's form."""
    folder = tmp_path_factory.mktemp("view")
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]\n"
        "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
        "{{ message.content }}\n[end]\n{% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return TeacherView(str(folder), "native")


def test_under_another_view_samples_are_read_and_encoded_anew(chat, student, batch, texts, view, monkeypatch):
    end, assistant = chat.end_id, chat.marker_ids["assistant"]
    said = {
        10: [*chat.encode_text("सोच\n"), assistant, *chat.encode_text("\nपानी दें\n"), end],
        11: [*chat.encode_text(" खाद दें"), end],  # no thought was asked for
        12: chat.encode_text("अधूरी सोच"),
        13: [end],
        14: [*chat.encode_text("सोच"), assistant, *chat.encode_text("\nअधूरी")],
    }
    monkeypatch.setattr(on_policy, "sample", lambda *_, **__: iter(said.values()))
    out = sample_batch(batch, student, chat, SHORT, LENGTH, view, seed=0, replicas=2)
    expected = {
        10: {"thought": "सोच", "advisory": "पानी दें"},
        11: {"thought": None, "advisory": "खाद दें"},
        14: {"thought": "सोच", "advisory": "अधूरी"},
    }
    assert out.tokens == sum(map(len, said.values()))
    assert list(unpack(out.batch)) == list(expected)
    rows = []
    for row_id, answer in expected.items():
        row = {name: texts[row_id - 10].get(name) for name in ("system", "scenario")} | answer
        teacher = view.encode(chat, row)
        rows.append(PackedRow(row_id, *map(np.array, (*chat.encode(row), teacher.input_ids, teacher.tokens))))
    taught = [count_targets(r.input_ids, r.segment_ids, chat.control_ids, r.teacher_tokens) for r in rows]
    assert torch.equal(out.batch["step_targets"], 2 * torch.from_numpy(np.sum(taught, axis=0)))
    ids, teacher_ids = out.batch["input_ids"].flatten(), out.batch["teacher_input_ids"].flatten()
    places = out.batch["teacher_tokens"].flatten()
    assert torch.equal(ids[places >= 0], teacher_ids[places[places >= 0]])
    assert (places >= 0).sum() == sum((row.teacher_tokens >= 0).sum() for row in rows)

    encode = TeacherView.encode
    monkeypatch.setattr(TeacherView, "encode", lambda *args: encode(*args)._replace(aligned=0))
    none = sample_batch(batch, student, chat, SHORT, LENGTH, view, seed=0).batch
    assert none.keys() == out.batch.keys()
    assert not unpack(none)


# ---------------------------------------------------------------------- a run


class StoppedError(Exception):
    pass


def test_a_run_with_on_policy_steps_resumes_bit_for_bit(distill_config, tmp_path, monkeypatch):
    """The cost is logged at the steps that had one; a run cut off and taken up again writes the same samples."""
    config = yaml.safe_load(distill_config.read_text())
    options = config["model"]["init_args"]
    options["on_policy"] = {"share": 0.5, "max_new_tokens": 16, "rows": 3}
    options["objective"]["kl"] = {"weight": 1.0, "divergence": "jsd", "segments": ["thought", "assistant"]}
    options["gradient_checkpointing"] = True
    config["trainer"] |= {"precision": "bf16-mixed", "limit_val_batches": 0}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    cli = main(["fit", "--config", str(distill_config)])
    logged = scalars(tmp_path / "lightning_logs" / "version_0")
    steps = [step for step in range(6) if is_on_policy(0.5, step, 0)]
    assert 0 < len(steps) < 6
    assert [step for step, _ in logged["on_policy/kl"]] == steps
    assert {tag for tag in logged if tag.startswith("on_policy/")} == {
        f"on_policy/{name}" for name in ("ce", "kl", "balance", "router_z", "generated_tokens", "generation_seconds")
    }
    assert [step for step, _ in logged["train/cka"]] == [step for step in range(6) if step not in steps]
    assert all(tokens > 0 for _, tokens in logged["on_policy/generated_tokens"])
    assert all(seconds > 0 for _, seconds in logged["on_policy/generation_seconds"])
    expected = dict(cli.model.model.hf.state_dict())

    config["trainer"]["default_root_dir"] = str(tmp_path / "again")
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    finish = DistillModule.on_before_optimizer_step

    def stop(module, optimizer):
        if module.global_step == 3:
            raise StoppedError
        finish(module, optimizer)

    monkeypatch.setattr(DistillModule, "on_before_optimizer_step", stop)
    with pytest.raises(StoppedError):
        main(["fit", "--config", str(distill_config)])
    monkeypatch.undo()
    again = main(["fit", "--config", str(distill_config)])
    assert again.run.folder.name == "version_0", "the run was taken up, not begun again"
    state = again.model.model.hf.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_text_that_nothing_scores_is_refused(dense, teacher):
    with pytest.raises(ValueError, match=r"on_policy\.share needs objective\.kl\.weight"):
        DistillModule(
            StudentConfig(source=str(dense)),
            TeacherConfig(source=str(teacher)),
            objective=Objective(cka=CKA(weight=1.0)),
            on_policy=OnPolicy(share=0.5),
        )
