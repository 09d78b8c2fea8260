"""`plan`: what it says of parameters, memory and operations is what a real step has; the command and its errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from agri_moe import cost
from agri_moe.cli import main
from agri_moe.data.chat import Segment
from agri_moe.losses import fused_ce_kl
from agri_moe.models.base import parameter_counts
from agri_moe.planning import Planner, read_config, read_run
from agri_moe.rehearsal import Ledger, Rows


def config_of(distill_config: Path, folder: Path, **model: Any) -> list[str]:
    """The small run's config, its model's keys changed; as arguments."""
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"] |= model
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True))
    return ["--config", str(path)]


def planner_of(args: list[str]) -> Planner:
    cli = read_config(args)
    return Planner(cli.model, cli.datamodule, read_run(cli.settings["trainer"]))


def real_module(args: list[str], accumulate: int = 1) -> tuple[Any, dict[str, torch.Tensor]]:
    """The module with its real models, and its first micro-batch."""
    cli = read_config(args)
    module, data = cli.model, cli.datamodule
    data.teacher_view = module.teacher_view
    batch = next(iter(data.train_dataloader()))
    module._trainer = SimpleNamespace(
        datamodule=data,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        world_size=1,
        accumulate_grad_batches=accumulate,
        global_step=0,
        precision="32-true",
        training=False,
        validating=False,
    )
    module.configure_model()
    return module, module.on_before_batch_transfer(batch, 0)


def rows_of(batch: dict[str, torch.Tensor]) -> Rows:
    """What the planner is told of a micro-batch."""
    kinds = (Segment.THOUGHT, Segment.ASSISTANT)
    thought, advisory = (float((batch["target_segments"] == kind).float().mean()) for kind in kinds)
    return Rows(*batch["input_ids"].shape, None, thought, advisory)


def real_step(module: Any, batch: dict[str, torch.Tensor], precision: str, clear: bool = True) -> None:
    """Forward and backward pass; between steps, gradients are cleared as soon as they are spent."""
    if clear:
        module.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        out = module.training_step(batch, 0)
    out["loss"].backward()


WIDE = {"kl": {"weight": 1.0}, "hidden": {"weight": 0.1}, "attention": {"weight": 0.1}, "diversity": {"weight": 0.1}}


@pytest.mark.parametrize(
    ("precision", "checkpointing", "objective", "accumulate"),
    [
        ("32-true", False, {"kl": {"weight": 1.0}, "cka": {"weight": 0.1}}, 1),
        ("32-true", True, {"kl": {"weight": 1.0}, "cka": {"weight": 0.1}}, 2),
        ("bf16-mixed", False, {"kl": {"weight": 1.0, "temperature": 2.0}}, 1),
        ("bf16-mixed", True, WIDE | {"anchor": {"cka": {"weight": 0.1}}}, 1),
    ],
)
def test_a_rehearsal_holds_what_a_real_step_holds(
    precision: str, checkpointing: bool, objective: Any, accumulate: int, distill_config: Path, tmp_path: Path
) -> None:
    args = config_of(distill_config, tmp_path, gradient_checkpointing=checkpointing, objective=objective)
    args += [f"--trainer.precision={precision}", f"--trainer.accumulate_grad_batches={accumulate}"]
    planner = planner_of(args)
    module, batch = real_module(args, accumulate)
    memory = planner.memory(0, planner.run, rows_of(batch), checkpointing=checkpointing)
    said = {part.name: part.bytes for part in memory.parts}
    ledger = Ledger()
    with ledger:
        real_step(module, batch, precision)
        with ledger.phase("second"):
            real_step(module, batch, precision, clear=accumulate == 1)
    peak = max(phase.peak for phase in ledger.phases)
    models = [module.model, *(getattr(module, name).model for name in ("teacher", "anchor") if hasattr(module, name))]
    weights = sum(p.nbytes for model in models for p in model.parameters())
    moments = 8 * sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    assert said["student: weights"] == sum(p.nbytes for p in module.model.parameters())
    assert said["optimizer: moments"] == moments
    assert said["gradients"] == sum(p.grad.nbytes for p in module.model.parameters() if p.grad is not None)
    assert memory.peak - weights - moments == pytest.approx(peak, rel=0.03)


def test_numbers_of_parameters_are_those_of_the_model(distill_config: Path, tmp_path: Path) -> None:
    stages = [{"steps": 2, "train": ["mlp.experts", "mlp.gate"]}, {"learning_rate_multipliers": {"embed": 0.0}}]
    for changes, stage in (({"freeze": ["self_attn", "norm"]}, 0), ({"stages": stages}, 0), ({"stages": stages}, 1)):
        args = config_of(distill_config, tmp_path, **changes)
        planner = planner_of(args)
        module, _ = real_module(args)
        model = module.model
        scales = module.stages[stage].scales([name for name, _ in model.hf.named_parameters()])
        for name, parameter in model.hf.named_parameters():
            parameter.requires_grad_(scales[name] > 0)
        student = planner.student(stage)
        assert (student.total, student.active, student.pieces.trained) == parameter_counts(model)
        assert planner.teacher is not None
        assert planner.teacher.total == module.teacher.model.hf.num_parameters()


def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[-1]


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 4 * math.prod(query) * key[2]


def _attention_backward(upstream: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    return 10 * math.prod(query) * key[2]


KERNELS: dict[Any, Any] = {
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
}


@pytest.mark.parametrize(
    ("checkpointing", "freeze"), [(False, []), (True, []), (False, ["self_attn", "norm"]), (False, ["embed_tokens"])]
)
def test_operations_are_those_that_are_counted_in_a_real_step(
    checkpointing: bool, freeze: list[str], distill_config: Path, tmp_path: Path
) -> None:
    changes = {"gradient_checkpointing": checkpointing, "freeze": freeze, "objective": {"kl": {"weight": 1.0}}}
    args = config_of(distill_config, tmp_path, **changes)
    planner = planner_of(args)
    module, batch = real_module(args)
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        real_step(module, batch, "32-true")
    sequences, length = batch["input_ids"].shape
    matrices = planner.student(0).matrices
    assert planner.teacher is not None
    work = cost.work(
        matrices,
        planner.teacher.matrices,
        None,
        length=length,
        teacher_length=length,
        supervised=len(batch["positions"]) / (sequences * length),
        taught=len(batch["kl_targets"]) / (sequences * length),
        recompute=checkpointing,
    )
    assert work.total * sequences * length == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "temperature"), [(9000, torch.bfloat16, 2.0), (7000, torch.float32, 1.0)]
)
def test_the_workspace_of_the_loss_is_what_the_loss_allocates(
    vocabulary: int, dtype: torch.dtype, temperature: float
) -> None:
    rows, taught, width, teacher_width = 300, 200, 24, 40
    hidden = torch.randn(rows, width, requires_grad=True)
    head = torch.randn(7000, width, requires_grad=True)
    teacher = torch.randn(taught, teacher_width).to(dtype), torch.randn(vocabulary, teacher_width).to(dtype)
    options: dict[str, Any] = {"ce_scale": 1.0, "kl_scale": 1.0, "temperature": temperature}
    with Ledger() as ledger:
        fused_ce_kl(hidden, head, torch.zeros(rows, dtype=torch.int64), *teacher, **options)
    shape = cost.LossShape(
        rows=rows,
        taught=taught,
        student=(7000, width),
        teacher=(vocabulary, teacher_width),
        hidden_size=4,
        student_size=4,
        teacher_size=dtype.itemsize,
        operand_size=4,
        tempered=temperature != 1,
    )
    workspace = cost.loss_workspace(shape, accelerator=False)
    assert workspace == pytest.approx(ledger.peak - hidden.nbytes - head.nbytes, rel=0.02)


def test_a_checkpoint_takes_what_is_said(distill_config: Path, tmp_path: Path) -> None:
    args = config_of(distill_config, tmp_path, freeze=["self_attn"])
    module, batch = real_module(args)
    real_step(module, batch, "32-true", clear=False)
    optimizer = torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad])
    optimizer.step()
    tensors = [*module.model.state_dict().values(), *(t for s in optimizer.state.values() for t in s.values())]
    stored = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}  # a tied head is written once
    disk = planner_of(args).disk()
    assert disk.checkpoint == pytest.approx(sum(stored.values()), rel=0.01)
    assert (disk.kept, disk.checkpoints) == (2, 2 * disk.checkpoint)


def test_work_by_hand() -> None:
    student = cost.Matrices(body=10, body_trained=4, attention=3, head=100, head_trained=False)
    teacher = cost.Matrices(body=50, body_trained=0, attention=7, head=300, head_trained=False)
    options: dict[str, Any] = {"length": 5, "teacher_length": 10, "supervised": 0.5, "taught": 0.25}
    work = cost.work(student, teacher, None, recompute=True, **options)
    assert work.teacher_body == 2 * (2 * 50 + 4 * 10 * 7)
    assert work.teacher_head == 0.25 * 600
    assert work.recomputed == work.forward_body + work.forward_attention == 20 + 60
    assert work.backward_body == 20 + 8
    assert work.backward_attention == 150
    assert work.head == 0.5 * 400
    assert work.anchor == 0


def test_steps_are_those_of_the_sampler(distill_config: Path, tmp_path: Path) -> None:
    args = [*config_of(distill_config, tmp_path), "--trainer.max_steps=-1", "--trainer.max_epochs=3"]
    planner = planner_of(args)
    cli = read_config(args)
    batches = len(cli.datamodule.train_dataloader())
    assert planner.steps() == 3 * math.ceil(batches / 2)
    assert planner_of([*args, "--trainer.limit_train_batches=3"]).steps() == 3 * 2
    assert planner_of([*args, "--trainer.max_steps=4"]).steps() == 4
    assert cost.epoch_steps(17, per_batch=2, ranks=4, accumulate=2, limit=1.0) == 2


def test_fsdp2_holds_shares_and_what_is_gathered(distill_config: Path, tmp_path: Path) -> None:
    strategy = "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy"
    args = [*config_of(distill_config, tmp_path), strategy, "--trainer.strategy.data_parallel_size=4"]
    planner = planner_of(args)
    assert (planner.run.ranks, planner.run.strategy) == (4, "fsdp2")
    memory = planner.memory(0, planner.run, planner.supply.rows, checkpointing=False)
    alone = planner_of(config_of(distill_config, tmp_path))
    whole = alone.memory(0, alone.run, alone.supply.rows, checkpointing=False)
    ours, theirs = ({part.name: part.bytes for part in m.parts} for m in (memory, whole))
    for name in ("student: weights", "optimizer: moments", "gradients"):
        assert ours[name] == theirs[name] // 4
    assert planner.teacher is not None
    head = planner.teacher.matrices.head * 4
    assert ours["teacher: weights"] == (theirs["teacher: weights"] - head) // 4 + head
    pieces = planner.whole.pieces
    assert ours["student: layers and head gathered"] == 4 * (2 * pieces.layer + pieces.root)
    assert pieces.root + 2 * pieces.layer == pieces.total


def test_the_command_prints_and_writes_it_and_leaves_nothing_behind(
    distill_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "plan.json"
    before = set(tmp_path.iterdir())
    args = ["--config", str(distill_config), "--data.tokens_per_batch=512", "--trainer.max_steps", "5"]
    main(["plan", *args, "--throughput", "1e9", "--gpu_memory=0.001", f"--output={output}"])
    said = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found["fits"] is False
    assert found["duration"]["steps"] == 5
    assert found["duration"]["flops_per_token"] == pytest.approx(sum(found["work"].values()))
    places = found["supply"]["rows"]["sequences"] * found["supply"]["rows"]["length"] * 2
    assert found["duration"]["step_seconds"] == pytest.approx(places * sum(found["work"].values()) / 1e9)
    for line in (
        f"student   {found['student']['total']:>17,}",
        "rows read",
        "peak, in the ",
        "Does not fit 0.001 GB",
        "model.gradient_checkpointing: true",
        "No single setting makes it fit",
        "Time at 0.001 TFLOP/s on each rank (as given)",
        "5 steps",
    ):
        assert line in said
    assert set(tmp_path.iterdir()) - before <= {output, tmp_path / "cache"}


def test_rows_that_cannot_be_read_are_assumed_and_said_to_be(
    distill_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--config", str(distill_config), "--data.train=absent.parquet", "--trainer.max_steps=-1"])
    said = capsys.readouterr().out
    assert "sequences assumed full" in said
    assert "absent.parquet does not exist" in said
    assert "give --throughput" in said
    assert "Fits 80 GB" in said


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *args])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_mistakes_are_one_sentence(distill_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={distill_config}"
    assert "leraning_rate" in refused(capsys, config, "--model.leraning_rate=1")
    assert "model.freeze: 'nothing'" in refused(capsys, config, "--model.freeze=[nothing]")
    assert "trainer.precision: 16-mixed" in refused(capsys, config, "--trainer.precision=16-mixed")
    assert "plan knows auto, ddp and ModelParallelStrategy" in refused(capsys, config, "--trainer.strategy=fsdp")
    assert "--throughput is -1" in refused(capsys, config, "--throughput=-1")
    assert "--gpu_memory is 0" in refused(capsys, config, "--gpu_memory=0")
    unreachable = refused(capsys, config, "--model.teacher.source=nobody/nothing")
    assert "model.teacher.source: nobody/nothing is no folder or hub name" in unreachable


def test_importing_the_tool_imports_nothing_heavy() -> None:
    code = "import sys, agri_moe.tools.plan; print({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
