"""What every training module of this package shares: the model, its trainable parts, the optimizer, the evaluation.

Shapes: B batch, T sequence, N supervised positions, M of them with KL, L layers, E experts.
"""

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric, MetricCollection
from transformers import AutoModelForCausalLM, PreTrainedModel

from agri_moe.data.chat import Chat, Segment
from agri_moe.generation import generate
from agri_moe.losses import Routing, routing, token_statistics
from agri_moe.metrics import RoutingStatistics, SegmentLoss, TeacherAgreement, balanced_perplexity
from agri_moe.models.causal import CausalModel, shard
from agri_moe.models.source import ModelConfig, check_vocabulary
from agri_moe.objective import Batch, Objective, Term
from agri_moe.teacher import TeacherSignal


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay.

    Args:
        weight_decay: Decay of matrices; vectors (norms, biases) have none.
        betas: Moments' decay rates.
        warmup_steps: Optimizer steps from 0 to the full learning rate.
        final_learning_rate: Learning rate at the last step, as a share of the full one.
    """

    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100
    final_learning_rate: float = 0.1


class LanguageModule(lightning.LightningModule, ABC):
    """A language model in training.

    Nothing is loaded before `configure_model`; `check` finds what can be found wrong before that.

    Args:
        objective: Terms and weights of the loss.
        learning_rate: Peak learning rate.
        optimizer: The rest of the optimizer's settings.
        freeze: Regular expressions; parameters whose name matches one (`re.search`) are not trained.
        learning_rate_multipliers: Regular expression -> factor on the learning rate; the first that matches a
            parameter's name counts, 0 freezes.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        max_new_tokens: Where `predict` cuts answers off.
    """

    model: CausalModel
    model_key: str
    val_routing: RoutingStatistics

    def __init__(
        self,
        objective: Objective | None = None,
        learning_rate: float = 1e-4,
        optimizer: OptimizerConfig | None = None,
        freeze: list[str] | None = None,
        learning_rate_multipliers: dict[str, float] | None = None,
        gradient_checkpointing: bool = False,
        max_new_tokens: int = 512,
    ):
        super().__init__()
        self.objective = objective or Objective()
        self.learning_rate = learning_rate
        self.optimizer_config = optimizer or OptimizerConfig()
        self.freeze_patterns = freeze or []
        self.learning_rate_multipliers = learning_rate_multipliers or {}
        self.gradient_checkpointing = gradient_checkpointing
        self.max_new_tokens = max_new_tokens
        self._step_terms: dict[str, tuple[Tensor, Tensor]] = {}

    # ------------------------------------------------------------------ what a module has to say

    @property
    @abstractmethod
    def model_config(self) -> ModelConfig:
        """Which model is trained."""

    @property
    def chat(self) -> Chat:
        """Tokenizer, markers and chat template of the data module."""
        return self.trainer.datamodule.chat  # type: ignore[attr-defined]

    def check(self, chat: Chat) -> None:
        """Find mistakes in the settings before any weight is read or any row is tokenised.

        Raises:
            ValueError: In one sentence that names the key.
        """
        config = self.model_config.hf_config(self.model_key, chat)
        check_vocabulary(self.model_config.source, config, chat, f"{self.model_key}.source")
        with torch.device("meta"):
            names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
        scales = self.learning_rate_scales(names)
        if not any(scales.values()):
            raise ValueError("model.freeze leaves nothing to train; take a pattern out.")

    # ------------------------------------------------------------------ building

    def setup(self, stage: str) -> None:
        """Check once more where the module is used without the command line."""
        if str(self.trainer.precision).startswith("16"):
            raise ValueError("trainer.precision: float16 is not supported; use bf16-mixed, bf16-true or 32-true.")
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            # Lightning's default takes the GPUs of a node for tensor parallelism: they would drift apart in silence.
            raise ValueError(
                "trainer.strategy: ModelParallelStrategy shards the data only; give it "
                f"init_args {{data_parallel_size: {self.trainer.world_size}, tensor_parallel_size: 1}}."
            )
        if not hasattr(self, "model"):
            self.check(self.chat)

    def configure_model(self) -> None:
        """Load the model and mark what is trained. Called by Lightning, once per stage; loads once."""
        if hasattr(self, "model"):
            return
        hf = self.model_config.load(self.model_key, self.chat)
        hf.config.use_cache = False
        if self.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        self.build(hf)
        total, active, trained = parameter_counts(self.model)
        rank_zero_info(f"Model: {total:,} parameters, {active:,} active for one token, {trained:,} trained.")

    def build(self, hf: PreTrainedModel) -> None:
        """Take `hf` as the model: freeze, shard, and set up the metrics that depend on its shape."""
        self.model = CausalModel(hf.train())
        scales = self.learning_rate_scales([name for name, _ in hf.named_parameters()])
        for name, parameter in hf.named_parameters():
            parameter.requires_grad_(scales[name] > 0)
        if self.device_mesh is not None:
            precision = str(self.trainer.precision)
            shard(self.model, self.device_mesh["data_parallel"], torch.bfloat16 if "bf16" in precision else None)
        self.val_loss = SegmentLoss({name: Segment[name.upper()] for name in self.objective.ce.segments})
        self.val_teacher = TeacherAgreement()
        self.val_terms = MetricCollection(
            {name: MeanMetric() for name in ("cka", "balance", "router_z")}, compute_groups=False
        )
        if self.model.routers:
            self.val_routing = RoutingStatistics(len(self.model.routers), self.model.num_experts)

    def learning_rate_scales(self, names: Sequence[str]) -> dict[str, float]:
        """Factor on the learning rate for each parameter name; 0 means frozen.

        Raises:
            ValueError: If a pattern matches no name, or is no regular expression.
        """
        rules = [(pattern, 0.0, "freeze") for pattern in self.freeze_patterns]
        rules += [(p, s, "learning_rate_multipliers") for p, s in self.learning_rate_multipliers.items()]
        for pattern, scale, key in rules:
            try:
                matches = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise ValueError(f"model.{key}: {pattern!r} is no regular expression ({error}).") from None
            if not matches:
                raise ValueError(
                    f"model.{key}: {pattern!r} matches no parameter; names look like {names[len(names) // 2]}."
                )
            if scale < 0:
                raise ValueError(f"model.{key}: the factor of {pattern!r} must not be negative.")
        return {name: next((scale for pattern, scale, _ in rules if re.search(pattern, name)), 1.0) for name in names}

    def configure_optimizers(self) -> Any:
        """AdamW over groups of (learning-rate factor, decayed or not), warm-up and cosine by step."""
        settings = self.optimizer_config
        named = {n: p for n, p in self.model.hf.named_parameters() if p.requires_grad}
        scales = self.learning_rate_scales([name for name, _ in self.model.hf.named_parameters()])
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for name, parameter in named.items():
            groups.setdefault((scales[name], parameter.ndim > 1), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.learning_rate * scale,
                    "weight_decay": settings.weight_decay if decayed else 0.0,
                }
                for (scale, decayed), parameters in groups.items()
            ],
            betas=settings.betas,
            fused=True,
        )
        schedule = partial(
            warmup_cosine,
            warmup=settings.warmup_steps,
            total=self.total_steps(),
            final=settings.final_learning_rate,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Lightning's own estimate is not used: it rebuilds the loaders and so loses the place in a resumed epoch.
        """
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            raise ValueError("trainer.max_steps or trainer.max_epochs must be set: the schedule needs an end.")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(data, "streaming", False):
            raise ValueError("trainer.max_steps must be set for streamed rows: their number is not known.")
        batches = len(data.train_dataloader())
        return trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the architecture beside the weights: export and generate then need no source folder."""
        checkpoint["hf_config"] = self.model.hf.config.to_dict()

    # ------------------------------------------------------------------ training

    @cached_property
    def replicas(self) -> int:
        """What the framework divides each micro-batch's gradient by: accumulated micro-batches times ranks."""
        return self.trainer.world_size * self.trainer.accumulate_grad_batches

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Choose positions on the CPU, where it costs no synchronisation with the device."""
        if isinstance(batch, dict) and "target_ids" in batch:
            return batch | self.objective.select(batch, self.control_ids)
        return batch

    @cached_property
    def control_ids(self) -> list[int]:
        """Markers and the end of text."""
        return sorted(self.chat.control_ids)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed from (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        torch.manual_seed(hash((seed, self.global_step, batch_idx, self.global_rank)))

    def learn(self, batch: Batch, signal: TeacherSignal | None, layers: Sequence[int] = ()) -> dict[str, Any]:
        """Forward pass and objective on one micro-batch.

        Args:
            batch: A packed micro-batch on the device.
            signal: The teacher's answer, or None.
            layers: Layers whose residual streams are compared with `signal.layers`.

        Returns:
            `loss`, the scalar to differentiate, and `routing` for the callbacks.
        """
        step, replicas = self.global_step, self.replicas
        read = partial(self.objective.logit_loss, batch=batch, signal=signal, step=step, replicas=replicas)
        out = self.model(batch, batch["positions"], read, layers)
        routed = self.routing(out.router_logits, batch)
        terms = self.objective.logit_terms(out.read, batch, with_teacher=signal is not None)
        teacher_layers = signal.layers if signal else []
        terms |= self.objective.sample_terms(out.layers, teacher_layers, routed, batch, step=step, replicas=replicas)
        self._keep(terms)
        loss = torch.stack([term.loss for term in terms.values()]).sum()
        return {"loss": loss, "routing": routed}

    def routing(self, router_logits: list[Tensor], batch: Batch) -> Routing | None:
        """What the routers did with the tokens that are no padding; None for a dense model."""
        if not router_logits:
            return None
        return routing(router_logits, self.model.top_k, (batch["segment_ids"] != Segment.PAD).flatten())

    def _keep(self, terms: dict[str, Term]) -> None:
        for name, term in terms.items():
            total, count = self._step_terms.get(name, (0.0, 0.0))
            self._step_terms[name] = (total + term.total.detach(), count + term.tokens)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log each term of the finished step, unweighted: its sum over micro-batches and ranks by its count."""
        pairs = torch.stack([torch.stack([total.float(), count.float()]) for total, count in self._step_terms.values()])
        pairs = self.trainer.strategy.reduce(pairs, reduce_op="sum")
        values = pairs[:, 0] / pairs[:, 1].clamp(min=1)
        self.log_dict({f"train/{n}": v for n, v in zip(self._step_terms, values, strict=True)}, prog_bar=True)
        self.log("train/learning_rate", self.learning_rate_now())
        self._step_terms.clear()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and log the norm before clipping.

        Not left to Lightning, which refuses to clip for a fused AdamW under any mixed precision: true of float16, whose
        gradients are still scaled here (and which `setup` refuses), but not of bfloat16.
        """
        if not gradient_clip_val:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            return
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        self.log("train/gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def learning_rate_now(self) -> float:
        """Learning rate of the first group, without its multiplier."""
        return self.learning_rate * self.lr_schedulers().lr_lambdas[0](self.global_step)  # type: ignore[union-attr]

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, batch: Batch, signal: TeacherSignal | None, layers: Sequence[int] = ()) -> None:
        """Add one micro-batch to the validation metrics.

        `val/ce` and `val/kl` are taken without label smoothing and at temperature 1, so that runs with different
        settings can be compared.
        """
        read = partial(
            token_statistics,
            targets_N=batch["targets"],
            teacher_hidden_MD=signal.hidden_MD if signal else None,
            teacher_head_VD=signal.head_VD if signal else None,
        )
        out = self.model(batch, batch["positions"], read, layers)
        self.val_loss.update(out.read.nll_N, batch["segments"])
        if signal is not None:
            self.val_teacher.update(out.read.kl_M, out.read.agree_M)
        routed = self.routing(out.router_logits, batch)
        if routed is not None:
            self.val_routing.update(routed)
        teacher_layers = signal.layers if signal else []
        terms = self.objective.sample_terms(out.layers, teacher_layers, routed, batch, step=0, replicas=1)
        for name, term in terms.items():
            self.val_terms[name].update(term.total / term.tokens.clamp(min=1), term.tokens)

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Answer scenarios greedily; each row comes back with its answer."""
        answers = generate(
            self.model.hf,
            self.chat,
            [row["prompt_ids"] for row in batch],
            max_new_tokens=self.max_new_tokens,
            batch_size=len(batch),
        )
        kept = ("row_id", "system", "scenario", "thought", "advisory")
        return [
            {name: row[name] for name in kept} | answer.columns() for row, answer in zip(batch, answers, strict=True)
        ]

    def on_validation_epoch_end(self) -> None:
        """Log what validation has gathered, across ranks."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log what the test has gathered, across ranks."""
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        losses = self.val_loss.compute()
        if not losses:
            rank_zero_warn(f"{prefix}: no token is supervised, so there is no loss to report.")
        names = {"loss": "ce"}
        values = {f"{prefix}/{names.get(name, name)}": value for name, value in losses.items()}
        if self.val_teacher.update_called:
            values |= {f"{prefix}/{name}": value for name, value in self.val_teacher.compute().items()}
        for name, metric in self.val_terms.items():
            if metric.update_called:
                values[f"{prefix}/{name}"] = metric.compute()
        if self.model.routers:
            values |= {f"{prefix}/{name}": value for name, value in self._routing_values(losses).items()}
            self.val_routing.reset()
        self.log_dict(values)
        for metric in (self.val_loss, self.val_teacher, *self.val_terms.values()):
            metric.reset()

    def _routing_values(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Means over the layers; nothing if no token was routed."""
        stats = self.val_routing.compute()
        if not stats:
            return {}
        values = {
            "router_entropy": stats["normalized_entropy"].mean(),
            "balance_score": stats["balance"].mean(),
            "dead_experts": stats["dead"].mean(),
        }
        if losses:
            values["balanced_perplexity"] = balanced_perplexity(losses["loss"], values["balance_score"])
        return values


def warmup_cosine(step: int, *, warmup: int, total: int, final: float) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` steps, then half a cosine down to `final` at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def parameter_counts(model: CausalModel) -> tuple[int, int, int]:
    """Parameters in all, active for one token (top-k of the experts), and trained."""
    total = trained = experts = 0
    for name, parameter in model.hf.named_parameters():
        total += parameter.numel()
        trained += parameter.numel() * parameter.requires_grad
        experts += parameter.numel() * (".experts." in name)
    active = total - experts + (experts * model.top_k // model.num_experts if model.num_experts else 0)
    return total, active, trained
