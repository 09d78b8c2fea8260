"""Each optimizer: the step it takes, what it keeps, and an exact resume."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from agri_moe.cli import main
from agri_moe.optimizer import OptimizerConfig
from tests.test_cli import refused

EIGHT_BITS = pytest.param(
    "adamw8bit",
    marks=pytest.mark.skipif(
        not importlib.util.find_spec("torchao"), reason="torchao (extra `lowbit`) is not installed"
    ),
)


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step, which takes longer than the steps of a small test."""
    with torch.compiler.set_stance("force_eager"):
        yield


def optimizer(name: str, weight: torch.Tensor) -> torch.optim.Optimizer:
    return OptimizerConfig(name=name).build([{"params": [weight], "lr": 0.01, "weight_decay": 0.1}])


def kept_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of everything in the optimizer's state."""
    size = 0
    for state in optimizer.state.values():
        for value in state.values():
            if not torch.is_tensor(value):
                continue
            inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            parts = [getattr(value, name) for name in inner] or [value]
            size += sum(part.numel() * part.element_size() for part in parts)
    return size


@pytest.mark.parametrize("name", ["adamw", EIGHT_BITS, "adafactor"])
def test_what_it_keeps_and_that_it_descends(name):
    per_parameter = {"adamw": 8.0, "adamw8bit": 2.1, "adafactor": 0.05}[name]
    torch.manual_seed(0)
    weight = torch.randn(4, 256, 128).requires_grad_()  # as fused experts are
    target = torch.randn(4, 256, 128)
    stepper = optimizer(name, weight)
    losses = []
    for _ in range(10):
        stepper.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        stepper.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert kept_bytes(stepper) / weight.numel() == pytest.approx(per_parameter, rel=0.1, abs=0.05)


@pytest.mark.parametrize("name", [EIGHT_BITS])
def test_eight_bits_step_like_thirty_two(name):
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 256), torch.randn(64, 256)
    moved = {}
    for which in ("adamw", name):
        weight = start.clone().requires_grad_()
        stepper = optimizer(which, weight)
        for _ in range(5):
            weight.grad = gradient.clone()
            stepper.step()
        moved[which] = (weight - start).detach()
    assert (moved[name] - moved["adamw"]).norm() < 0.05 * moved["adamw"].norm()


def test_a_missing_library_is_named_before_anything_loads(monkeypatch, distill_config, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else found(name, *a))
    message = refused(capsys, "fit", "--config", distill_config, "--model.optimizer.name=adamw8bit")
    assert "model.optimizer.name" in message
    assert "pip install torchao" in message


@pytest.mark.parametrize("name", [EIGHT_BITS, "adafactor"])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(name, distill_config, tmp_path):
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["optimizer"] |= {"name": name, "schedule": "inverse_sqrt"}
    config["trainer"] |= {"accumulate_grad_batches": 1, "max_steps": 4, "limit_val_batches": 0}
    config["trainer"]["callbacks"] = config["trainer"]["callbacks"][:1]
    distill_config.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(distill_config)])
    runs = tmp_path / "lightning_logs"
    main(["fit", "--config", str(distill_config), f"--resume={runs / 'version_0/checkpoints/step=00000002.ckpt'}"])
    first, second = (weights(runs / f"version_{i}") for i in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The student's at the last step."""
    return torch.load(run / "checkpoints" / "step=00000004.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.55, 12: 0.1, 20: 0.1}),
        ("inverse_sqrt", {0: 0.2, 3: 0.8, 4: 1.0, 19: 0.5, 79: 0.25}),  # a quarter of the rate at 16 times the step
    ],
)
def test_the_way_of_the_learning_rate(schedule, values):
    config = OptimizerConfig(schedule=schedule, final_learning_rate=0.1)
    assert {step: config.factor(step, warmup=4, total=12) for step in values} == pytest.approx(values)
