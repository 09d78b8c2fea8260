"""benchmarks/ at tiny sizes: what is compared is the same, and what is counted is right. Nothing here is timed."""

import json
import math
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cached
import contestants
import gpu
import growth
import loss_step
import measure
import packing
import run_all
import step
import upcycle

from agri_moe.data.logit_cache import LogitCache, to_arrays
from agri_moe.models.upcycle import UpcycleSpec
from agri_moe.models.upcycle import upcycle as write_upcycled
from agri_moe.objective import Objective
from agri_moe.terms import KL, Balance, CrossEntropy, RouterZ

TINY = Namespace(
    rows=4, micro_rows=2, max_length=48, random=True, seed=1, vocabulary=300, width=32, layers=2,
    teacher_width=48, teacher_layers=3, repeats=2, threads=1,
)  # fmt: skip


@pytest.fixture
def setting():
    made = contestants.setting_of(TINY)
    # No control tokens: the teacher is then asked at every label, as the peers ask it.
    return replace(made, corpus=made.corpus._replace(control_ids=frozenset()))


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "OUTPUT", tmp_path)
    return tmp_path


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    script.main()


# ---------------------------------------------------------------------- what is shared


def test_ratio_is_taken_round_by_round():
    assert measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, 1.0, 3.0)


def test_contestants_take_turns_in_another_order_each_round():
    called = []
    seconds = measure.in_turns({name: lambda n=name: called.append(n) for name in "abc"}, 2)
    assert "".join(called) == "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_products_and_their_gradients_are_as_large_as_they_say():
    forward, to_input, to_weight = measure.Product(3, 5, 7, 2).with_gradients()
    assert forward.flops == to_input.flops == to_weight.flops == 2 * 2 * 3 * 5 * 7
    products = measure.Products([forward, to_input, to_weight])
    with FlopCounterMode(display=False) as counted:
        products()
    assert counted.get_total_flops() == products.flops


def test_report_writes_what_it_prints(output, capsys):
    measure.report("part", measure.table(("a", "b"), [["x", 1.0]]), {"value": 1})
    assert "| x | 1.00 |" in capsys.readouterr().out
    written = json.loads((output / "part.json").read_text())
    assert written["value"] == 1
    assert written["torch"] == torch.__version__


def test_marks_say_which_side_they_are_on():
    assert measure.mark("time", 1.2, 1.3) == "pass: time 1.20, at most 1.3"
    assert measure.mark("share", 0.5, 0.7, at_least=True) == "MISS: share 0.50, at least 0.7"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_a_step_rises_by_what_it_holds_at_most():
    held = []
    size_mb = 200

    def hold():
        held.append(torch.ones(size_mb * 250_000))

    assert measure.above_mb(hold, held.clear) == pytest.approx(size_mb, rel=0.05)
    held.clear()
    found = measure.peak_mb(lambda: torch.ones(size_mb * 250_000))
    assert found["peak"] - found["before"] == pytest.approx(size_mb, rel=0.05)


# ---------------------------------------------------------------------- the loss step


def test_every_loss_is_the_same_kl():
    problem = loss_step.Problem(tokens=12, vocabulary=200, width=16, teacher_width=24)
    exact = loss_step.in_float64(problem)
    logits = problem.hidden_ND.double() @ problem.head_VD.double().T
    teacher = problem.teacher_hidden_ND.double() @ problem.teacher_head_VD.double().T
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    assert exact.value == pytest.approx(kl.item(), rel=1e-12)
    assert torch.allclose(exact.hidden_ND, torch.autograd.grad(kl, problem.hidden_ND)[0].double(), atol=1e-7)
    arguments = Namespace(chunk_sizes=[5], divergences=["forward"])
    losses = {name: loss for name, loss in loss_step.contestants(arguments).items() if "CE" not in name}
    assert "ours" in losses
    for name, loss in losses.items():
        assert max(loss_step.errors(problem, loss, exact)) < 1e-5, name


def test_loss_step_reports(output, monkeypatch, capsys):
    monkeypatch.setattr(loss_step, "apart", lambda *arguments: 10.0)
    sizes = ["--tokens", "8", "--vocabulary", "100", "--width", "8", "--teacher_width", "8", "--threads", "1"]
    run(monkeypatch, loss_step, *sizes, "--repeats", "2")
    assert "time over the products'" in capsys.readouterr().out
    found = json.loads((output / "loss_step.json").read_text())["contestants"]
    assert len(found["ours"]["seconds"]) == len(found["ours with CE"]["seconds"]) == 2


# ---------------------------------------------------------------------- the whole step


def gradients(contestant, optimizer, model):
    """What reaches the optimizer in one step, by parameter name."""
    found = {}

    def look(*_, **__):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.step = look
    contestant.step()
    return found


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-6, msg=name)


def ours(setting, ce, **options):
    kl = KL(weight=1.0, segments=["thought", "assistant"])
    objective = Objective(
        ce=CrossEntropy(weight=ce), kl=kl, balance=Balance(weight=0.0), router_z=RouterZ(weight=0.0)
    )  # fmt: skip
    made = contestants.Ours(setting, setting.new_teacher(), objective=objective, **options)
    return gradients(made, made.optimizer, made.module.model.hf)


def test_the_plain_step_learns_what_ours_learns_packed_or_not(setting):
    plain = contestants.Plain(setting, setting.new_teacher())
    expected = gradients(plain, plain.optimizer, plain.student)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    same(ours(setting, ce=1.0), expected)
    same(ours(setting, ce=1.0, packed=False), expected)


def test_gkd_learns_our_kl(setting):
    pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt -e '.[bench]'")
    made = contestants.Gkd(setting, setting.new_teacher())
    same(ours(setting, ce=0.0), gradients(made, made.trainer.optimizer, made.trainer.model))


def test_useful_flops_are_those_that_torch_counts_without_padding(setting):
    one = replace(setting, micro_batches=[setting.micro_batches[0][:1]])
    row = one.micro_batches[0][0]
    ids = torch.from_numpy(row.input_ids)[None]
    labels = int((row.segment_ids[1:] >= 3).sum())
    student, teacher = one.new_student(), one.new_teacher()
    student.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        with torch.no_grad():
            asked = teacher.model(input_ids=ids).last_hidden_state[0, :labels]
            _ = torch.mm(asked, teacher.lm_head.weight.T)
        hidden = student.model(input_ids=ids, use_cache=False).last_hidden_state[0, :labels]
        torch.mm(hidden, student.lm_head.weight.T).square().sum().backward()
    operators = {str(name): flops for name, flops in counted.get_flop_counts()["Global"].items()}
    products = sum(flops for name, flops in operators.items() if "mm" in name)
    useful = sum(product.flops for product in step.useful_products(one))
    assert useful == pytest.approx(products, rel=0.02)  # tokens are spread evenly here, by the router there
    length, student_config, teacher_config = len(row.input_ids), one.student, one.teacher
    widths = [c.num_attention_heads * c.head_dim * c.num_hidden_layers for c in (student_config, teacher_config)]
    assert step.attention_flops(one) == 2 * length**2 * (3 * widths[0] + widths[1])
    assert step.useful_flops(one) == useful + step.attention_flops(one)


def test_the_profile_knows_the_parts_of_a_step(setting):
    rows, totals = step.profiled(contestants.Ours(setting, setting.new_teacher()))
    parts = {"teacher body", "student forward", "backward", "optimizer", "data"}
    heads = {"teacher head", "student head and its gradients", "loss, passes over the logits"}
    assert parts | heads <= totals.keys()
    assert all(total > 0 for total in totals.values())
    assert [row[0] for row in rows] == sorted(totals, key=lambda part: -totals[part])


def test_step_reports_and_measures_memory(output, monkeypatch, capsys):
    monkeypatch.setattr(step, "apart", lambda *arguments: {"before": 100.0, "peak": 120.0})
    options = {k: v for k, v in vars(TINY).items() if k != "random"}
    sizes = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    run(monkeypatch, step, "--random", *sizes)
    out = capsys.readouterr().out
    assert "share of matrix throughput" in out
    written = json.loads((output / "step.json").read_text())["contestants"]
    assert written["ours"]["tokens_per_second"] > 0
    assert written["plain"]["memory"] == {"before": 100.0, "peak": 120.0}
    found = step.memory(contestants.setting_of(TINY), "ours")
    # Of this process, in which other tests' memory may be given back meanwhile: the peak can lie below what was there.
    assert math.isnan(found["peak"]) or min(found["peak"], found["before"]) > 0


# ---------------------------------------------------------------------- packing and growth


def test_useful_shares_by_hand():
    assert packing.padded_share([1, 3, 2, 2], 2) == 8 / (2 * 3 + 2 * 2)
    assert packing.padded_share([1, 3, 2], 2) == 6 / (2 * 3 + 2)
    # Best fit: 10+6 and 9+7, both rounded up to 16.
    assert packing.packed_share([6, 7, 9, 10], 2, longest=16) == 1.0
    assert packing.packed_share([9, 8], 2, longest=16) == 17 / 32


def test_packing_reports(output, monkeypatch, capsys):
    options = {k: v for k, v in vars(TINY).items() if k != "random"}
    run(monkeypatch, packing, "--random", *[w for k, v in options.items() for w in (f"--{k}", str(v))])
    assert "Packing is" in capsys.readouterr().out
    shares = json.loads((output / "packing.json").read_text())["useful_share"]
    assert all(0 < share <= 1 for share in shares.values())


def test_growth_reports_and_plots(output, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(growth, "apart", lambda _, tokens, vocabulary: float(vocabulary))
    sizes = {"tokens": 4, "vocabulary": 128, "width": 8, "teacher_width": 8, "experts": 2, "body_width": 16,
             "body_tokens": 16, "layers": 1, "repeats": 2, "threads": 1, "plot": tmp_path / "growth.png"}  # fmt: skip
    run(monkeypatch, growth, *[w for k, v in sizes.items() for w in (f"--{k}", str(v))])
    assert "pass: loss memory over x8 tokens 1.00" in capsys.readouterr().out
    assert (tmp_path / "growth.png").stat().st_size > 0
    written = json.loads((output / "growth.json").read_text())
    assert {line: list(points) for line, points in written["seconds"].items()} == {
        "tokens": ["1", "2", "4", "8"], "vocabulary": ["1", "2", "4"], "experts": ["1", "2", "4"]
    }  # fmt: skip
    assert growth.growth({1: [1.0, 2.0, 1.0], 4: [3.0, 2.0, 2.0]}, 4) == 2.0


# ---------------------------------------------------------------------- upcycling and the GPU


def test_a_killed_upcycling_ends_with_the_same_bytes(tmp_path):
    dense, output = tmp_path / "dense", tmp_path / "again"
    upcycle.write_source(upcycle.config_of(Namespace(tiny=True)), dense)
    write_upcycled(dense, tmp_path / "kept", UpcycleSpec())
    whole = upcycle.digests(tmp_path / "kept")
    assert len(whole) > 5
    assert upcycle.interrupted(dense, output, whole, after=0.0).endswith(": same bytes")
    assert not output.exists()


def test_copying_and_upcycling_write_alike(tmp_path):
    dense = tmp_path / "dense"
    upcycle.write_source(upcycle.config_of(Namespace(tiny=True)), dense)
    seconds = upcycle.times(dense, tmp_path, repeats=2)
    assert {name: len(values) for name, values in seconds.items()} == {"copy": 2, "jitter 0": 2, "jitter 0.01": 2}
    upcycle.copy_folder(tmp_path / "kept", tmp_path / "copied")
    assert upcycle.digests(tmp_path / "copied") == upcycle.digests(tmp_path / "kept")


def test_the_gpu_benchmark_runs_on_a_cpu(output, monkeypatch, capsys):
    arguments = ["--device", "cpu", "--tiny", "--rows", "2", "--peer_rows", "2", "--max_length", "32"]
    run(monkeypatch, gpu, *arguments, "--repeats", "1", "--fp8")
    out = capsys.readouterr().out
    assert "fp8 teacher left out" in out
    found = json.loads((output / "gpu.json").read_text())["contestants"]
    assert found["ours"]["tokens_per_second"] > 0
    assert found["plain"]["share"][0] > 0
    assert "teacher body" in found["ours"]["profile_ms"]


def test_a_contestant_without_memory_is_told(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room for 1 GB\nmore")

    monkeypatch.setitem(contestants.CONTESTANTS, "plain", full)
    setting = contestants.setting_of(TINY)
    assert gpu.contest("plain", setting, setting.new_teacher(), 1) == {"out_of_memory": "no room for 1 GB"}


def test_the_real_shapes_are_those_of_the_hub():
    setting = gpu.setting_of(Namespace(tiny=False, max_length=64, device="cpu"), rows=1)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in step.AutoModelForCausalLM.from_config(c).parameters())
                 for c in (setting.teacher, setting.student)]  # fmt: skip
    # Qwen3-14B's card: 14.8B; Qwen3-0.6B has 28 layers of 3 x 1024 x 3072 in its FFN, of which there are now 7 more.
    assert sizes == [14_768_307_200, 596_049_920 + 28 * (7 * 3 * 1024 * 3072 + 8 * 1024)]


# ---------------------------------------------------------------------- training from a cache


def test_excess_and_marks_by_hand():
    def cell(values):
        return {seed: {"ce": 1.0, "kl": value} for seed, value in enumerate(values)}

    names = (cached.ONLINE, cached.TOP, cached.NO_TAIL)
    values = ([1.0, 2.0, 4.0], [1.01, 2.02, 4.0], [2.0])
    found = {f"KL alone, {name}": cell(own) for name, own in zip(names, values, strict=True)}
    results = cached.with_loss(found | {"CE + KL, online": cell([1.0]), "start": cell([3.0])})
    assert results["CE + KL, online"][0]["loss"] == 2.0
    assert results["KL alone, online"][2]["loss"] == 4.0
    above = cached.excess(results, cached.CELLS["KL alone, top 50"], "kl")
    assert above == pytest.approx((0.02 / 3, 0.01 / math.sqrt(3)))
    assert cached.marks(results) == [
        "pass: KL alone, top 50: held-out loss over online, % (spread 0.58) 0.67, at most 1",
        "pass: KL alone, top 50: held-out ce over online, % (spread 0.00) 0.00, at most 1",
    ]
    rows = [line.split("|")[1:-1] for line in cached.table(results).splitlines()]
    shown = {(row[0].strip(), row[1].strip()): row[-1].strip() for row in rows}
    assert shown["KL alone", "top 50, no tail"] == "+100.00"
    assert shown["-", "start"] == shown["CE + KL", "online"] == "-"


def test_cached_trains_and_erases_the_tail(corpus, tmp_path, monkeypatch, capsys):
    shutil.copytree(corpus, tmp_path / "corpus")
    training = cached.SETTINGS["embedded"].dense
    tiny = replace(training, steps=2, shape=training.shape | {"num_hidden_layers": 1})
    setting = replace(cached.SETTINGS["embedded"], teacher=replace(tiny, steps=4), dense=tiny, answers=0)
    monkeypatch.setitem(cached.SETTINGS, "real", setting)
    monkeypatch.setattr(cached, "quiet", lambda: None)  # what it sets, other tests would find
    arguments = ["--seeds", "1", "--steps", "1", "--cells", "CE + KL, online; KL alone, top 50, no tail"]
    cached.run([*arguments, "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "| KL alone  | top 50, no tail | 1" in out
    assert "| CE + KL   | online          | 1" in out
    errors = {
        name: own["error"] for name, own in json.loads((tmp_path / "cached.json").read_text())["gradients"].items()
    }
    assert errors.keys() == {*cached.COMMANDS, cached.NO_TAIL}
    assert 0 < errors["50 samples"] < errors["12 samples"]
    kept, erased = (
        LogitCache(tmp_path / "answers" / name.replace(", ", "_").replace(" ", "_"))
        for name in (cached.TOP, cached.NO_TAIL)
    )
    for (key, one), (other_key, other) in zip(kept, erased, strict=True):
        assert key == other_key
        before, after = to_arrays(one), to_arrays(other)
        assert (before.ids_MK == after.ids_MK).all()
        expected = before.probs_MK / before.probs_MK.sum(1, keepdims=True)
        np.testing.assert_allclose(after.probs_MK, expected, rtol=1e-5)
        assert before.tail_M.min(initial=1) > 0
        assert (after.tail_M == 0).all()
    before = sorted(path.name for path in tmp_path.glob("*.json"))
    cached.run([*arguments, "--output", str(tmp_path), "--table"])
    assert sorted(path.name for path in tmp_path.glob("*.json")) == before
    cached.run([*arguments[:4], "--from_teacher", "--cells", "KL alone, online", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "cached_from_teacher.json").read_text())["results"]
    assert 0 <= found["start"]["0"]["kl"] < 1e-3 < kl_of(tmp_path, "start"), "it begins as the teacher"


def kl_of(folder, cell):
    return json.loads((folder / "cached.json").read_text())["results"][cell]["0"]["kl"]


def test_run_all_knows_its_parts():
    scripts = Path(run_all.__file__).parent
    assert all((scripts / f"{part}.py").is_file() for part in run_all.PARTS)
    (command,) = run_all.commands(["step"], random=True)
    assert command[2:] == ["--profile", "--random"]


def test_no_data_is_one_sentence(monkeypatch):
    monkeypatch.setattr(contestants, "DATA", Path("/nowhere"))
    with pytest.raises(SystemExit, match="AGRI_MOE_DATA"):
        contestants.real_rows(1, 10, 0)
