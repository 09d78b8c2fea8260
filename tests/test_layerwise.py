"""Layer-wise distillation through the command line: both modes, resume, evaluation."""

import json
import math

import lightning
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from agri_moe.cli import main
from agri_moe.trained import load_checkpoint
from tests.test_cli import scalars
from tests.test_two_ranks import launch

COOLING = {"start": 2.0, "end": 1.0, "steps": 4}


def fit(path, *more):
    return main(["fit", f"--config={path}", *more])


def layers_of(cli):
    """Each layer's state after a run, from memory or from its files."""
    if cli.model.mode == "parallel":
        return [{k: v.clone() for k, v in moe.state_dict().items()} for moe in cli.model.layers]
    return [load_file(path) for path in sorted((cli.run.folder / "layers").glob("*.safetensors"))]


def assert_same(one, other, exactly=True):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if exactly:
                assert torch.equal(a[name], b[name]), name
            else:
                torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_both_modes_give_the_same_layers(layerwise_config):
    options = {"router_noise": "gumbel", "router_noise_scale": {"start": 1.0, "end": 0.0, "steps": 4}}
    parallel = fit(layerwise_config("parallel.yaml", **options))
    sequential = fit(layerwise_config("sequential.yaml", mode="sequential", **options))
    assert parallel.trainer.global_step == 4
    assert sequential.trainer.global_step == 8
    assert_same(layers_of(parallel), layers_of(sequential), exactly=False)
    metrics = parallel.trainer.callback_metrics
    for name in ("mse", "relative_error", "cosine", "balance_score", "ce", "ce_dense", "perplexity"):
        assert metrics[f"val/{name}"].isfinite()
    assert metrics["val/relative_error/layer_01"] < 1
    assert metrics["train/cosine/layer_00"].isfinite()
    # What the last layer's validation says must agree, too.
    last = sequential.trainer.callback_metrics
    torch.testing.assert_close(last["val/relative_error/layer_01"], metrics["val/relative_error/layer_01"])
    assert "val/relative_error/layer_00" not in last or not last["val/relative_error/layer_00"].isnan()


def test_sequential_over_epochs_sees_the_same_rows_again(layerwise_config):
    seen = {}

    class Rows(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            key = module.mode, trainer.global_step // (6 if module.mode == "sequential" else 10**6)
            seen.setdefault(key, []).append(batch["input_ids"].clone())

    from agri_moe.training_cli import TrainingCLI, run_training

    class Watched(TrainingCLI):
        def instantiate_trainer(self, **kwargs):
            trainer = super().instantiate_trainer(**kwargs)
            trainer.callbacks.append(Rows())
            return trainer

    for mode in ("parallel", "sequential"):
        path = layerwise_config(f"{mode}.yaml", max_steps=6, accumulate=1, mode=mode)
        run_training("fit", ["--config", path, "--trainer.limit_train_batches=4"], Watched)
    parallel = seen["parallel", 0]
    assert len(parallel) == 6
    for layer in (0, 1):
        again = seen["sequential", layer]
        assert len(again) == 6
        assert all(torch.equal(a, b) for a, b in zip(parallel, again, strict=True))


MOVING = {"every_n_steps": 2, "min_width": 4, "max_width": 32, "multiple_of": 2, "decay": 0.5}


@pytest.mark.parametrize("mode", ["parallel", "sequential", "replaced", "moving"])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(layerwise_config, mode, tmp_path):
    options = {"mode": "parallel"} if mode == "parallel" else {"mode": "sequential"}
    if mode == "moving":
        options["reallocation"] = MOVING
    if mode == "replaced":
        options["inputs"] = "replaced"
    whole = fit(layerwise_config("whole.yaml", **options), f"--trainer.default_root_dir={tmp_path / 'whole'}")
    expected = layers_of(whole)
    for stop in (
        (1, 3, 4, 5) if mode == "sequential" else (2, 7) if mode == "moving" else (3,) if mode == "parallel" else (5,)
    ):
        root = tmp_path / f"cut{stop}"
        path = layerwise_config(f"cut{stop}.yaml", **options)

        class Stop(lightning.Callback):
            def __init__(self, at):
                self.at = at

            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == self.at:
                    raise RuntimeError("cut off")

        from agri_moe.training_cli import TrainingCLI, run_training

        class Cut(TrainingCLI):
            def instantiate_trainer(self, stop=stop, **kwargs):
                trainer = super().instantiate_trainer(**kwargs)
                trainer.callbacks.append(Stop(stop))  # after the checkpoint's
                return trainer

        with pytest.raises(RuntimeError, match="cut off"):
            run_training("fit", ["--config", path, f"--trainer.default_root_dir={root}"], Cut)
        resumed = fit(path, f"--trainer.default_root_dir={root}")
        assert resumed.run.number == 0
        assert_same(layers_of(resumed), expected)


def test_replaced_inputs_are_what_the_replaced_model_gives(layerwise_config, dense):
    cli = fit(layerwise_config(mode="sequential", inputs="replaced"))
    reading = fit(layerwise_config("dense.yaml", mode="sequential"))
    one, other = layers_of(cli), layers_of(reading)
    assert_same(one[:1], other[:1])
    assert not torch.equal(one[1]["up_SD"], other[1]["up_SD"])


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_validate_scores_all_layers_and_the_replaced_model(layerwise_config, mode):
    fitted = fit(layerwise_config(mode=mode, reallocation=MOVING))
    cli = main(
        [
            "validate",
            f"--trainer.default_root_dir={fitted.trainer.default_root_dir}",
            "--config",
            str(fitted.run.config),
        ]
    )
    metrics = cli.trainer.callback_metrics
    model = cli.model.dense
    states = layers_of(fitted)
    assert len(cli.model.layers) == 2
    assert_same([moe.state_dict() for moe in cli.model.layers], states)
    # Independently: forward hooks on the modules of one batch, token by token.
    loader = cli.datamodule.val_dataloader()
    batch = next(iter(loader))
    valid = (batch["segment_ids"] != 0).flatten()
    inputs = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda _, args, out, i=i: inputs.update({i: (args[0], out)}))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for i in range(2):
        x, y = (t.flatten(0, 1)[valid] for t in inputs[i])
        with torch.no_grad():
            got = cli.model.layers[i](x).output_ND
        relative = (got - y).norm() / y.norm()
        torch.testing.assert_close(metrics[f"val/relative_error/layer_0{i}"], relative, rtol=1e-4, atol=1e-5)
        cosine = F.cosine_similarity(got, y).mean()
        torch.testing.assert_close(metrics[f"val/cosine/layer_0{i}"], cosine, rtol=1e-4, atol=1e-5)
    targets = batch["target_segments"].flatten() != 0
    nll = F.cross_entropy(logits.flatten(0, 1)[targets], batch["target_ids"].flatten()[targets])
    torch.testing.assert_close(metrics["val/ce_dense"], nll, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["val/perplexity_dense"], nll.exp(), rtol=1e-3, atol=1e-3)


def test_the_exact_start_is_the_dense_model(layerwise_config):
    """Half width, top-2: the control. Scored without any training."""
    path = layerwise_config(expert_width=0.5, init_from_dense=True)
    metrics = main(["validate", f"--config={path}", "--ckpt_path=source"]).trainer.callback_metrics
    assert metrics["val/cosine"] > 1 - 1e-5
    assert metrics["val/relative_error"] < 1e-3
    assert abs(metrics["val/ce"] - metrics["val/ce_dense"]) < 1e-4


def test_the_checkpoint_holds_mixtures_and_facts_only(layerwise_config):
    cli = fit(layerwise_config())
    path = sorted((cli.run.folder / "checkpoints").glob("*.ckpt"))[-1]
    content = torch.load(path, weights_only=True)
    names = {name.split(".", 2)[-1] if name.startswith("layers.") else name for name in content["state_dict"]}
    assert names == {"router_ED", "gate_SD", "up_SD", "down_SD", "temperature", "_widths", "target_power"}
    facts = content["layerwise"]
    assert (facts["width"], facts["dense_width"], facts["num_layers"], facts["gated"]) == (32, 64, 2, True)
    assert facts["rule"]["top_k"] == 2


def test_accumulation_and_one_batch_give_the_same_gradient(layerwise_config):
    """The loss is divided once, by the tokens of the whole step; balance and its like are off, being statistics."""
    off = {"balance_weight": 0.0, "router_z_weight": 0.001}
    one = fit(layerwise_config("one.yaml", max_steps=2, accumulate=1, **off), "--data.tokens_per_batch=2048")
    two = fit(layerwise_config("two.yaml", max_steps=2, accumulate=2, **off), "--data.tokens_per_batch=1024")
    for a, b in zip(layers_of(one), layers_of(two), strict=True):
        torch.testing.assert_close(a["down_SD"], b["down_SD"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_width": 0.3}, r"model\.expert_width is 0\.3"),
        ({"expert_width": 65}, r"model\.expert_width is 65: .*up to the dense network's 64"),
        ({"num_experts_per_tok": 5}, r"model\.num_experts_per_tok is 5: it must be between 1 and num_experts, 4"),
        ({"inputs": "replaced"}, r"model\.inputs: replaced needs mode: sequential"),
        ({"routing": "expert_choice", "drop_tokens": True}, r"model\.drop_tokens is for token_choice"),
        ({"router_temperature": 0.0}, r"model\.router_temperature is 0\.0: it must be above 0"),
        ({"reallocation": {}}, r"model\.reallocation: experts begin with 16 neurons"),
        (
            {"reallocation": MOVING, "optimizer": {"name": "adafactor"}},
            r"model\.optimizer\.name: adafactor has",
        ),
        ({"capacity_factor": 0.0}, r"model\.capacity_factor is 0\.0"),
    ],
)
def test_mistakes_are_one_sentence_before_weights(layerwise_config, no_models, capsys, changes, message):
    import re

    with pytest.raises(SystemExit):
        fit(layerwise_config(**changes))
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert "\n" not in error


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "expert_choice"},
        {"drop_tokens": True, "capacity_factor": 1.0},
        {
            "init_from_dense": False,
            "router_noise": "gaussian",
            "router_temperature": {"start": 2.0, "end": 1.0, "steps": 4},
        },
    ],
)
def test_other_ways_of_routing_train(layerwise_config, options):
    cli = fit(layerwise_config(**options), "--trainer.max_steps=6")
    values = cli.trainer.callback_metrics
    assert values["train/relative_error"].isfinite()
    assert values["val/ce"].isfinite()
    if options.get("routing") == "expert_choice":
        assert values["val/balance_score"] > 1 - 1e-6
    if "router_temperature" in options:
        assert math.isclose(float(cli.model.layers[0].temperature), 1.0)


def test_experts_of_high_loss_grow(layerwise_config):
    parallel = fit(layerwise_config("parallel.yaml", reallocation=MOVING))
    sequential = fit(layerwise_config("sequential.yaml", reallocation=MOVING, mode="sequential"))
    assert_same(layers_of(parallel), layers_of(sequential), exactly=False)
    history = parallel.model.history
    assert sorted((e["layer"], e["step"]) for e in history) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    for entry in history:
        assert sum(entry["widths"]) == 64
    moved = [entry for entry in history if entry["step"] == 2]
    for entry in moved:
        widths, losses = entry["widths"], entry["losses"]
        assert max(widths) == 18
        assert widths[losses.index(max(losses))] == 18
        assert widths[losses.index(min(losses))] == 14
        assert entry["change"] < 0.2
    assert sorted(e["widths"] for e in sequential.model.history) == sorted(e["widths"] for e in history)
    content = torch.load(sorted((parallel.run.folder / "checkpoints").glob("*.ckpt"))[-1], weights_only=True)
    assert content["layerwise"]["history"] == history


def test_two_ranks_train_as_one(layerwise_config, tmp_path):
    """From a random start; the scale of the squared error is the first rank's sample's, hence the tolerance."""
    off = {"balance_weight": 0.0, "init_from_dense": False, "mode": "sequential"}
    fit(
        layerwise_config("one.yaml", accumulate=1, **off),
        f"--trainer.default_root_dir={tmp_path / 'one'}",
        "--data.tokens_per_batch=2048",
    )
    path = layerwise_config("two.yaml", accumulate=1, **off)
    launch(path, f"--trainer.default_root_dir={tmp_path / 'two'}", "--trainer.devices=2", "--trainer.strategy=ddp")
    runs = [tmp_path / name / "lightning_logs" / "version_0" for name in ("one", "two")]
    first, second = map(scalars, runs)
    for tag in ("train/relative_error", "train/cosine", "train/router_z"):
        assert [step for step, _ in first[tag]] == list(range(8))
        assert [v for _, v in second[tag]] == pytest.approx([v for _, v in first[tag]], rel=0.02), tag
    assert len(list((runs[1] / "layers").glob("*.safetensors"))) == 2


def test_streamed_rows_start_and_train(layerwise_config):
    cli = fit(layerwise_config(mode="sequential"), "--data.streaming=true", "--data.shuffle_buffer=16")
    assert cli.trainer.global_step == 8
    assert cli.trainer.callback_metrics["train/relative_error"].isfinite()


def test_another_run_goes_on_from_a_checkpoint_and_takes_the_finished_layers_along(layerwise_config, capsys):
    path = layerwise_config(mode="sequential")
    first = fit(path)
    checkpoint = first.run.folder / "checkpoints" / "step=00000006.ckpt"
    second = fit(path, f"--resume={checkpoint}")
    assert second.run.folder != first.run.folder
    assert_same(layers_of(second), layers_of(first))
    with pytest.raises(SystemExit):
        fit(path, f"--resume={checkpoint}", "--trainer.max_steps=5")
    assert "give each layer 5 steps, the checkpoint was made with 4" in capsys.readouterr().err


def test_what_is_no_language_model_is_refused_by_plan(layerwise_config, capsys, no_models):
    path = layerwise_config()
    with pytest.raises(SystemExit):
        main(["plan", "--config", path])
    assert "plan adds up what training a language model costs" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["samples.SampleAdvisories", "attention.AttentionMonitor"])
def test_callbacks_for_a_language_model_are_refused(layerwise_config, capsys, no_models, name):
    callbacks = json.dumps([{"class_path": f"agri_moe.callbacks.{name}"}])
    with pytest.raises(SystemExit):
        fit(layerwise_config(), f"--trainer.callbacks+={callbacks}")
    assert "take it out of trainer.callbacks" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(layerwise_config, precision):
    cli = fit(
        layerwise_config(dtype="bfloat16", expert_width=0.5, learning_rate=1e-5), f"--trainer.precision={precision}"
    )
    assert cli.trainer.callback_metrics["val/cosine"] > 0.99
    assert cli.model.dense.dtype == torch.bfloat16
    trained = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert cli.model.layers[0].up_SD.dtype == trained


def test_two_matrices_and_biases_train(layerwise_config, tmp_path, corpus):
    """A family without a gate, and without a stock mixture: through the package all the same."""
    source = AutoConfig.for_model(
        "gpt_neox", vocab_size=768, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(source).save_pretrained(tmp_path / "neox")
    cli = fit(layerwise_config(source=str(tmp_path / "neox"), expert_width=0.5, mode="sequential", learning_rate=1e-5))
    assert cli.trainer.callback_metrics["val/cosine"] > 0.99
    checkpoint = sorted((cli.run.folder / "checkpoints").glob("*.ckpt"))[-1]
    with pytest.raises(SystemExit):
        main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "stock")])
    model, _ = load_checkpoint(checkpoint, "--model")
    assert model(torch.arange(8)[None]).logits.isfinite().all()
