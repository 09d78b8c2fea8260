"""What every training module of this package shares: the model, its trainable parts, the optimizer, the evaluation.

Shapes: B batch, T sequence, N supervised positions, M of them with KL, L layers, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from agri_moe.data.chat import Chat, Segment
from agri_moe.data.merged_tokens import MergedTokens
from agri_moe.evaluation import Evaluation, Row, score_answers
from agri_moe.expert_use import choices
from agri_moe.generation import generate
from agri_moe.losses import Routing, max_violation, routing, token_statistics
from agri_moe.metrics import GroupRouting, RoutingStatistics, balance_score, balanced_perplexity
from agri_moe.models.causal import CausalModel, Forward
from agri_moe.models.experts import visits
from agri_moe.models.routing import POSITIONS, RoutingConfig, token_positions
from agri_moe.models.sharding import shard
from agri_moe.models.source import ModelConfig, check_vocabulary
from agri_moe.models.training import TrainingModule, layer_name
from agri_moe.models.upcycle import is_moe
from agri_moe.models.validation import Validation
from agri_moe.objective import Batch, Objective, Plan, Running, Term
from agri_moe.optimizer import OptimizerConfig
from agri_moe.schedules import Moment
from agri_moe.stages import Stage, StageSettings, check_total, settings, spans, stage_at, trained_summary
from agri_moe.teacher import TeacherSignal


class LanguageModule(TrainingModule, ABC):
    """A language model in training.

    Nothing is loaded before `configure_model`; `check` finds what can be found wrong before that.

    Args:
        objective: Terms and weights of the loss.
        learning_rate: Peak learning rate.
        optimizer: The rest of the optimizer's settings.
        freeze: Regular expressions; parameters whose name matches one (`re.search`) are not trained.
        learning_rate_multipliers: Regular expression -> factor on the learning rate; the first that matches a
            parameter's name counts, 0 freezes.
        stages: Parts of the run with settings of their own, one after the other; each is as if a new run had begun
            from the weights that the one before it left, only that the rows go on. None is one stage.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        routing: How a mixture's routers choose in training; None leaves them to the stock model.
        max_new_tokens: Where `test` and `predict` cut answers off; at 0 `test` has none written.
        balance_beta: Weight of imbalance in the balanced perplexity, exp(CE) exp(beta (1 - B)) with B the mean over the
            layers of the normalised entropy of the experts' load; no part of the loss.

    Attributes:
        evaluation: What the last `test` found.
        merged_tokens: The model's tokens that join several of the pieces that its teacher reads; None without such.
    """

    merged_tokens: MergedTokens | None = None
    model: CausalModel
    model_key: str
    validation: Validation
    evaluation: Evaluation

    def __init__(
        self,
        objective: Objective | None = None,
        learning_rate: float = 1e-4,
        optimizer: OptimizerConfig | None = None,
        freeze: list[str] | None = None,
        learning_rate_multipliers: dict[str, float] | None = None,
        stages: list[Stage] | None = None,
        gradient_checkpointing: bool = False,
        routing: RoutingConfig | None = None,
        max_new_tokens: int = 512,
        balance_beta: float = 1.0,
    ):
        super().__init__()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.stage_config = stages
        self.stages = settings(
            stages,
            objective=objective or Objective(),
            learning_rate=learning_rate,
            warmup_steps=self.optimizer_config.warmup_steps,
            freeze=freeze or [],
            multipliers=learning_rate_multipliers or {},
        )
        self.gradient_checkpointing = gradient_checkpointing
        self.routing_config = routing
        self.max_new_tokens = max_new_tokens
        self.balance_beta = balance_beta
        self._step_load: Tensor | None = None  # [L, E] assignments of the step's micro-batches
        self._answered: list[Row] = []  # rows of a test with the model's answers
        self._step_terms: dict[str, Tensor] = {}
        self._routed_loads: Tensor | None = None  # of the routers, by layer; see `Routers.end_pass`
        self._spans: list[range] | None = None  # of the stages, while fitting
        self._entered: int | None = None
        self._resting: list[Tensor] = []

    # ------------------------------------------------------------------ what a module has to say

    @property
    @abstractmethod
    def model_config(self) -> ModelConfig:
        """Which model is trained."""

    def check(self, chat: Chat) -> None:
        """Find mistakes in the settings before any weight is read or any row is tokenised.

        Raises:
            ValueError: In one sentence that names the key.
        """
        self.optimizer_config.check()
        if self.max_new_tokens < 0:
            raise ValueError(f"model.max_new_tokens is {self.max_new_tokens}: it must be at least 0.")
        if self.balance_beta < 0:
            raise ValueError(f"model.balance_beta is {self.balance_beta:g}: it must be at least 0.")
        config = self.model_config.hf_config(self.model_key, chat)
        check_vocabulary(self.model_config.source, config, chat, f"{self.model_key}.source")
        if any(objective.uses("diversity") for objective in self.objectives) and not is_moe(config):
            raise ValueError(
                f"objective.diversity compares experts, and {self.model_key} has none: set its weight to 0."
            )
        if self.routing_config is not None:
            self.routing_config.check(config, self.model_key)
        with torch.device("meta"):
            names = [name for name, _ in AutoModelForCausalLM.from_config(config).named_parameters()]
        for stage in self.stages:
            if not any(stage.scales(names).values()):
                raise ValueError(
                    "model.freeze leaves nothing to train; take a pattern out."
                    if self.stage_config is None
                    else f"{stage.key} trains nothing; take a pattern out of what it freezes."
                )

    def check_steps(self, max_steps: int) -> None:
        """Find stages that are longer than the run, as far as that shows before any row is read.

        Args:
            max_steps: As the trainer has it; -1 if epochs end the run.

        Raises:
            ValueError: If they are.
        """
        if self.stage_config and max_steps > 0:
            check_total(self.stage_config, max_steps)
        if self.routing_config and max_steps > 0:
            self.routing_config.check_steps(max_steps)

    @property
    def teacher_layers(self) -> int:
        """Layers of the model that is compared with; 0 where there is none."""
        return 0

    def projections(self, student: PreTrainedConfig) -> dict[tuple[int, int], int]:
        """Pairs of layers whose widths differ -> the other model's width, where the objective compares them."""
        return {}

    # ------------------------------------------------------------------ building

    def setup(self, stage: str) -> None:
        """Check once more where the module is used without the command line."""
        super().setup(stage)
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            # Lightning's default takes the GPUs of a node for tensor parallelism: they would drift apart in silence.
            raise ValueError(
                "trainer.strategy: ModelParallelStrategy shards the data only; give it "
                f"init_args {{data_parallel_size: {self.trainer.world_size}, tensor_parallel_size: 1}}."
            )
        if self.device_mesh is not None and self.stage_config and self.optimizer_config.name != "adamw":
            raise ValueError(
                f"model.optimizer.name: {self.optimizer_config.name} has moments that a sharded run cannot begin anew "
                "at a stage; use adamw, or leave model.stages out."
            )
        if not hasattr(self, "model"):
            self.check(self.chat)
        self._spans = self._entered = None
        if stage == "fit":
            self._spans = self._stage_spans()
            if self.routing_config is not None:
                self.routing_config.check_steps(self._spans[-1].stop)
        chosen = self.routing_config is not None and self.routing_config.kind == "expert_choice"
        if chosen and getattr(self.trainer.datamodule, "group_by", None):  # type: ignore[attr-defined]
            raise ValueError(
                "data.group_by tells which experts a group's tokens choose, and with model.routing.kind: expert_choice "
                "experts choose: leave one of the two out."
            )

    def configure_model(self) -> None:
        """Load the model and mark what is trained. Called by Lightning, once per stage; loads once."""
        if hasattr(self, "model"):
            return
        mesh = self.device_mesh
        pieces = None if mesh is None else self.model_config.in_pieces(self.model_key, self.chat)
        hf = self.model_config.load(self.model_key, self.chat) if pieces is None else pieces.shape()
        hf.config.use_cache = False
        if self.gradient_checkpointing:
            hf.gradient_checkpointing_enable({"use_reentrant": False})
        self.build(hf)
        if pieces is not None:
            pieces.fill(hf, self.trainer.strategy.root_device)
        total, active, trained = parameter_counts(self.model)
        rank_zero_info(f"Model: {total:,} parameters, {active:,} active for one token, {trained:,} trained.")

    def build(self, hf: PreTrainedModel) -> None:
        """Take `hf` as the model: freeze, shard, and set up the metrics that depend on its shape."""
        self.model = CausalModel(hf.train(), self.projections(hf.config), self.routing_config)
        if self.routing_config is not None and self.routing_config.kind == "expert_choice":
            rank_zero_warn(
                "model.routing.kind: expert_choice: experts choose among the tokens that are there, in evaluation too: "
                "text written token by token is answered by another function than was trained. No stock model has it, "
                "and export refuses it."
            )
        self.plans = [objective.plan(self.model.num_layers, self.teacher_layers) for objective in self.objectives]
        factors = self._learning_rate_factors()
        for name, parameter in self._parameters_by_name().items():
            parameter.requires_grad_(any(factors[name]))
        if self.device_mesh is not None:
            mixed = self.trainer.precision == "bf16-mixed"
            shard(self.model, self.device_mesh["data_parallel"], torch.bfloat16 if mixed else None)
        self.running_means = nn.ModuleList(
            nn.ModuleDict(objective.running(plan)) for objective, plan in zip(self.objectives, self.plans, strict=True)
        )
        segments: dict[str, int] = {
            name: Segment[name.upper()] for objective in self.objectives for name in objective.ce.segments
        }
        routers, experts = len(self.model.routers), self.model.num_experts
        self.validation = Validation(segments, self._evaluated_terms(), routers, experts, self.balance_beta)

    def _evaluated_terms(self) -> list[str]:
        """Names of the terms that are validated: each as a whole, and by layer of the student where it has layers."""
        names = ["balance", "router_z"] if self.model.routers else []
        for objective, plan in zip(self.objectives, self.plans, strict=True):
            layers = {name: [student for student, _ in pairs] for name, pairs in plan.pairs.items()}
            if objective.uses("diversity"):
                layers["diversity"] = list(range(len(self.model.routers)))
            names += layers
            names += [layer_name(name, layer) for name in layers for layer in layers[name]]
        return list(dict.fromkeys(names))

    def _learning_rate_factors(self) -> dict[str, tuple[float, ...]]:
        """Factors on the learning rate for each parameter name, one per stage; 0 means frozen there."""
        names = [name for name, _ in self.model.hf.named_parameters()]
        by_stage = [stage.scales(names) for stage in self.stages]
        # A projection belongs to a term of the objective, and is no part of what patterns choose from.
        used = [{f"projections.{i}_{j}.weight" for i, j in plan.pairs.get("hidden", [])} for plan in self.plans]
        projections = {
            name: tuple(float(name in stage) for stage in used)
            for name, _ in self.model.projections.named_parameters("projections")
        }
        return {name: tuple(scales[name] for scales in by_stage) for name in names} | projections

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The model's by their Hugging Face names, and the projections."""
        return dict(self.model.hf.named_parameters()) | dict(self.model.projections.named_parameters("projections"))

    def configure_optimizers(self) -> Any:
        """One optimizer for all stages, over groups of (learning-rate factors, decayed or not).

        What no stage trains is in no group. A learning rate is a function of the optimizer step alone, so that a run
        resumes exactly in the middle of a stage.
        """
        factors = self._learning_rate_factors()
        members: dict[tuple[tuple[float, ...], bool], list[Tensor]] = {}
        for name, parameter in self._parameters_by_name().items():
            if any(factors[name]):
                members.setdefault((factors[name], parameter.ndim > 1), []).append(parameter)
        groups: list[dict[str, Any]] = []
        lambdas: list[Callable[[int], float]] = []
        for (scales, decayed), parameters in members.items():
            peaks = [stage.learning_rate * scale for stage, scale in zip(self.stages, scales, strict=True)]
            first = next((peak for peak in peaks if peak), 1.0)
            decay = self.optimizer_config.weight_decay if decayed else 0.0
            groups.append({"params": parameters, "lr": first, "weight_decay": decay})
            lambdas.append(partial(self._schedule, [peak / first for peak in peaks], self._stage_spans()))
        optimizer = self.optimizer_config.build(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, peaks: Sequence[float], spans: Sequence[range], step: int) -> float:
        """The learning rate's way over the stage that has this step, times that stage's peak."""
        index = stage_at(spans, step)
        return peaks[index] * self.optimizer_config.factor(
            step - spans[index].start, warmup=self.stages[index].warmup_steps, total=len(spans[index])
        )

    def _stage_spans(self) -> list[range]:
        if self._spans is not None:
            return self._spans
        total = self.total_steps()
        if self.stage_config and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return [range(total)]  # a trial of a few steps sees the first stage only
        return spans(self.stage_config, total, self._epoch_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the architecture beside the weights, and the optimizer's state by name.

        Export and generate then need no source folder, and a sharded run can go on from whole weights: by number, as
        torch has it, the state of a parameter would be looked for in another order.
        """
        checkpoint["hf_config"] = self.model.hf.config.to_dict()
        if self.routing_config is not None:
            checkpoint["routing"] = self.routing_config.facts
        for state, optimizer in zip(checkpoint.get("optimizer_states", []), self.trainer.optimizers, strict=True):
            _by_name(state, self._numbered(optimizer))

    def _numbered(self, optimizer: torch.optim.Optimizer) -> list[str]:
        """Names of the parameters in the order in which a state that is kept by number counts them."""
        if self.device_mesh is not None:  # Lightning's numbering of what it has gathered from shards
            return [name for name, _ in self.named_parameters()]
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the state of the objective to a checkpoint that another objective left.

        Running means, and what other routing keeps, begin afresh where it has none, and are dropped where they are no
        longer asked for. So are projections; but one that was never trained measures and teaches nothing.

        Raises:
            ValueError: If the checkpoint lacks a projection.
        """
        state = checkpoint.get("state_dict")
        if not state:  # sharded, read into what is there
            return
        own = self.state_dict()
        for prefix in ("running_means.", "model.projections.", "model.routing."):
            ours = {name: t for name, t in own.items() if name.startswith(prefix)}
            theirs = {name for name in state if name.startswith(prefix)}
            fits = {name for name in theirs if name in ours and ours[name].shape == state[name].shape}
            if prefix == "model.projections." and (lacking := sorted(ours.keys() - fits)):
                raise ValueError(
                    f"the checkpoint lacks {lacking[0]}, which objective.hidden trains: keep objective.hidden.layers "
                    "as the run had it, or set objective.hidden.weight: 0."
                )
            if prefix == "model.routing." and theirs - fits:
                rank_zero_warn(
                    "the checkpoint was trained with model.routing, parts of which this config leaves out: temperature "
                    "and biases of its routers are not what they were."
                )
            for name in theirs - fits:
                del state[name]
            state.update({name: t for name, t in ours.items() if name not in fits})

    # ------------------------------------------------------------------ training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Choose positions on the CPU, where it costs no synchronisation with the device."""
        if isinstance(batch, dict) and "target_ids" in batch:
            selected = self.objective.select(batch, self.control_ids, self.merged_tokens)
            return batch | selected | self.routed_tokens(batch)
        return batch

    def routed_tokens(self, batch: Batch) -> Batch:
        """What routers of other ways want to know of a batch, on the CPU: which tokens are no padding."""
        return {} if self.routing_config is None else {POSITIONS: token_positions(batch)}

    @cached_property
    def control_ids(self) -> list[int]:
        """Markers and the end of text."""
        return sorted(self.chat.control_ids)

    # ------------------------------------------------------------------ stages

    @property
    def stage_index(self) -> int:
        """Which stage is in force, from 0; outside of training the last one, for which the others prepare."""
        if self._spans is None:
            return len(self.stages) - 1
        # A validation between two stages is about the one that has just been trained.
        validating = self._trainer is not None and self.trainer.validating
        return stage_at(self._spans, max(self.global_step - validating, 0))

    @property
    def stage(self) -> StageSettings:
        """What holds in the stage in force."""
        return self.stages[self.stage_index]

    @property
    def objective(self) -> Objective:
        """Terms and weights of the loss in the stage in force."""
        return self.stage.objective

    @property
    def objectives(self) -> list[Objective]:
        """Those of every stage."""
        return [stage.objective for stage in self.stages]

    @property
    def schedule_step(self) -> int:
        """Optimizer steps done in the stage in force: what schedules count."""
        return self.global_step - self._spans[self.stage_index].start if self._spans else self.global_step

    @property
    def stage_progress(self) -> float:
        """Share of the stage in force that is done, from 0 to 1."""
        return min(self.schedule_step / len(self._spans[self.stage_index]), 1.0) if self._spans else 1.0

    def _enter_stage(self) -> None:
        """Take over what the stage of this step trains, where it is another than that of the step before."""
        index = self.stage_index
        if self.stage_config is None or index == self._entered:
            return
        assert self._spans is not None, "training has been set up"
        self._entered = index
        self._unlog()
        factors = self._learning_rate_factors()
        named = {name: p for name, p in self._parameters_by_name().items() if any(factors[name])}
        self._resting = [p for name, p in named.items() if not factors[name][index]]
        for parameter in self._resting:
            parameter.grad = None
        if isinstance(self.trainer.strategy, SingleDeviceStrategy):
            # DDP and FSDP2 fix once and for all which gradients they wait for; there they are formed and dropped.
            for name, parameter in named.items():
                parameter.requires_grad_(factors[name][index] > 0)
        span = self._spans[index]
        if self.global_step == span.start:
            self._forget_moments(self.trainer.optimizers[0])
        scales = {name: scale[index] for name, scale in factors.items()}
        sizes = {name: p.numel() for name, p in self._parameters_by_name().items()}
        rank_zero_info(
            f"Stage {index + 1} of {len(self.stages)}, steps {span.start} to {span.stop}: "
            f"{trained_summary(scales, sizes)}."
        )

    def _forget_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Let AdamW start afresh."""
        optimizer.state.clear()
        if self.device_mesh is None:
            return
        # A sharded checkpoint is read into an optimizer with moments for all it holds: what rests needs zeros in it.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed from (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        self._enter_stage()
        if self.model.routing is not None:
            self.model.routing.begin_step(self.global_step)
        torch.manual_seed(hash((self.seed, self.global_step, batch_idx, self.global_rank)))

    @property
    def now(self) -> Moment:
        """Where training stands."""
        return Moment(self.schedule_step, self.stage_progress, self.replicas)

    @property
    def plan(self) -> Plan:
        """What the objective in force wants to see of the models."""
        return self.plans[self.stage_index]

    @property
    def running(self) -> Running:
        """The running means of the objective in force."""
        return dict(cast(nn.ModuleDict, self.running_means[self.stage_index]).items())  # type: ignore[arg-type]

    def learn(
        self,
        batch: Batch,
        signal: TeacherSignal | None = None,
        anchor: TeacherSignal | None = None,
    ) -> dict[str, Any]:
        """Forward pass and objective on one micro-batch.

        Args:
            batch: A packed micro-batch on the device.
            signal: The teacher's answer, or None.
            anchor: The dense source's answer, or None.

        Returns:
            `loss`, the scalar to differentiate, and `routing` for the callbacks.
        """
        objective, now, running = self.objective, self.now, self.running
        read = partial(objective.logit_loss, batch=batch, signal=signal, now=now, running=running)
        out = self.model(batch, batch["positions"], read, self.plan.student)
        routed = self.routing(out, batch)
        terms = objective.logit_terms(out.read, batch, with_teacher=signal is not None)
        terms |= objective.sample_terms(out, signal, anchor, routed, batch, plan=self.plan, now=now, running=running)
        terms |= self.own_terms(out, batch, signal)
        self._keep(terms, out.loads)
        if routed is not None:
            self._step_load = routed.load_LE if self._step_load is None else self._step_load + routed.load_LE
        # DDP waits for the gradients of projections too, in a stage or step that does not use them.
        idle = [projected[:0].sum() for projected in out.projected.values()]
        loss = torch.stack([*(term.loss for term in terms.values()), *idle]).sum()
        return {"loss": loss, "routing": routed}

    def own_terms(self, out: Forward[Any], batch: Batch, signal: TeacherSignal | None) -> dict[str, Term]:
        """Terms of a subclass beside the objective's, by name; none here. docs/extending.md has an example.

        Args:
            out: The student's forward pass.
            batch: With the keys that `Objective.select` adds, on the device.
            signal: The teacher's answer; None without a teacher.
        """
        return {}

    def routing(self, out: Forward[Any], batch: Batch) -> Routing | None:
        """What the routers did with the tokens that are no padding; None for a dense model."""
        if not out.router_logits:
            return None
        valid_N = (batch["segment_ids"] != Segment.PAD).flatten()
        worked_LE = torch.stack([load[1] for load in out.loads]) if out.loads else None
        return routing(out.router_logits, self.model.top_k, valid_N, worked_LE)

    def _keep(self, terms: dict[str, Term], loads: Sequence[Tensor]) -> None:
        """Add up total, tokens and layers of each term, and the routers' loads, over the micro-batches of a step."""
        if loads:
            loads_L2E = torch.stack(list(loads))
            self._routed_loads = loads_L2E if self._routed_loads is None else self._routed_loads + loads_L2E
        for name, term in terms.items():
            parts = [term.total.detach().float()[None], term.tokens.float()[None]]
            sums = torch.cat(parts if term.layers is None else [*parts, term.layers.float()])
            self._step_terms[name] = self._step_terms[name] + sums if name in self._step_terms else sums

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log each term of the finished step, unweighted: its sum over micro-batches and ranks by its count."""
        if self.skipped:
            return
        for parameter in self._resting:  # before clipping: it neither moves nor counts in the norm
            parameter.grad = None
        kept = list(self._step_terms.values())
        if self._step_load is not None:
            kept.append(self._step_load.flatten())
        sums = self.trainer.strategy.reduce(torch.cat(kept), reduce_op="sum")
        parts = sums.split([len(part) for part in kept])
        running = self.running
        if "teacher_entropy" in running:  # the one that this step took, before the mean moves on
            self.log("train/temperature", self.objective.temperature(self.schedule_step, running))
        values = {}
        for name, (total, tokens, *layers) in zip(self._step_terms, parts[: len(self._step_terms)], strict=True):
            values[name] = total / tokens.clamp(min=1)
            if name in running:
                seen = torch.stack(layers) if layers else total
                running[name].update(seen / tokens.clamp(min=1), tokens > 0)
        load_LE = None if self._step_load is None else parts[-1].view_as(self._step_load)
        self._step_load = None
        self.log_step(values, self._told(values["ce"], load_LE))
        self._end_routing_step()
        self.log("train/learning_rate", self.learning_rate_now())
        if self.stage_config is not None:
            self.log("train/stage", float(self.stage_index + 1))
        self._step_terms.clear()

    def _told(self, ce: Tensor, load_LE: Tensor | None) -> dict[str, Tensor]:
        """What follows from a step's cross-entropy (as its loss has it, label smoothing included) and load."""
        values = {"perplexity": ce.exp()}
        if load_LE is not None:
            values["balance_score"] = balance_score(load_LE).mean()
            values["dead_experts"] = (load_LE == 0).float().mean()
            values["balanced_perplexity"] = balanced_perplexity(ce, values["balance_score"], self.balance_beta)
        return values

    def _end_routing_step(self) -> None:
        """Log what the routers did in the finished step, and let them learn from its loads."""
        if self.model.routing is None or self._routed_loads is None:
            return
        chosen_LE, worked_LE = self.trainer.strategy.reduce(self._routed_loads, reduce_op="sum").unbind(1)
        self._routed_loads = None
        values = {"router_temperature": self.model.routing.temperature, "max_violation": max_violation(chosen_LE)}
        if self.model.routing.rule.drop:
            values["dropped"] = 1 - worked_LE.sum() / chosen_LE.sum().clamp(min=1)
        self.log_dict({f"train/{name}": value for name, value in values.items()})
        assert self._spans is not None, "training has been set up"
        self.model.routing.end_step(chosen_LE, self._spans[-1].stop - self.global_step)

    def log_step(self, values: dict[str, Tensor], told: dict[str, Tensor]) -> None:
        """Log the terms of a finished step, and what follows from them."""
        self.log_dict({f"train/{name}": value for name, value in values.items()}, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in told.items()})

    def clipped_together(self) -> list[list[nn.Parameter]]:
        """All that the stage in force trains, in an order that does not hang on the optimizer's groups."""
        resting = {id(parameter) for parameter in self._resting}
        return [[parameter for parameter in self.model.parameters() if id(parameter) not in resting]]

    @property
    def kind_of_step(self) -> str:
        """Each stage has an objective of its own."""
        return f"stage {self.stage_index + 1}"

    def forget_step(self) -> None:
        """Leave the finished step out, of running means too."""
        super().forget_step()
        self._step_terms.clear()
        self._step_load = self._routed_loads = None

    def learning_rate_now(self) -> float:
        """Learning rate of what has no multiplier."""
        return self._schedule([stage.learning_rate for stage in self.stages], self._stage_spans(), self.global_step)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, batch: Batch, signal: TeacherSignal | None = None, anchor: TeacherSignal | None = None) -> None:
        """Add one micro-batch to the validation metrics.

        `val/ce` and `val/kl` are taken without label smoothing and at temperature 1, so that runs with different
        settings can be compared.
        """
        read = partial(
            token_statistics,
            targets_N=batch["targets"],
            teacher_hidden_MD=signal.hidden_MD if signal else None,
            teacher_head_VD=signal.head_VD if signal else None,
            sparse_teacher=signal.sparse if signal else None,
            merged=signal.merged if signal else None,
        )
        with choices(self.model.routers if self.validation.groups is not None else []) as chosen:
            out = self.model(batch, batch["positions"], read, self.plan.student)
        routed = self.routing(out, batch)
        self.validation.update(out.read, batch, routed, chosen, taught=signal is not None)
        terms = self.objective.sample_terms(
            out, signal, anchor, routed, batch, plan=self.plan, now=Moment(), running=self.running
        )
        for name, term in terms.items():
            layers = [student for student, _ in self.plan.pairs.get(name, [])]
            if name == "diversity":
                layers = list(range(len(self.model.routers)))
            self.validation.update_term(name, term, layers)

    @property
    def val_routing(self) -> RoutingStatistics | None:
        """What the routers did with the validation rows so far; None for a dense model."""
        return self.validation.routing

    @property
    def val_groups(self) -> GroupRouting | None:
        """What is known of groups of the validation rows so far; None where none are told apart."""
        return self.validation.groups

    def _sort_rows(self, split: str) -> None:
        """Get ready to tell groups of rows apart, where the data module has any."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        groups = data.groups(split) if getattr(data, "group_by", None) else None
        if groups is None:
            self.validation.groups = None
            return
        names, of_row = list(groups.names), torch.from_numpy(groups.of_row)
        if any(isinstance(logger, MLFlowLogger) for logger in self.trainer.loggers):
            # It drops letters that are not plain: two Hindi names would be one curve.
            names = [name if name.isascii() else f"{number} {name}" for number, name in enumerate(names)]
        metric = GroupRouting(names, of_row, len(self.model.routers), self.model.num_experts)
        self.validation.groups = metric.to(self.device)

    def _weigh_tokens(self) -> None:
        """Get ready to tell losses by bytes of text, where a token's are known."""
        known = self.chat.token_bytes
        self.validation.token_bytes = None if known is None else torch.tensor(known, device=self.device)

    @property
    def answers_tests(self) -> bool:
        """Whether a test has the model answer the rows too: the data module then gives them as prompts besides."""
        return self.max_new_tokens > 0

    def test_step(self, batch: Batch | list[Row], batch_idx: int, dataloader_idx: int = 0) -> None:
        """What validation measures, of packed rows; of prompts, the answers."""
        if isinstance(batch, list):
            self._answered += self.predict_step(batch, batch_idx)
        else:
            self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Row], batch_idx: int) -> list[Row]:
        """Answer scenarios greedily; each row comes back with its answer."""
        answers = generate(
            self.model,
            self.chat,
            [row["prompt_ids"] for row in batch],
            max_new_tokens=self.max_new_tokens,
            batch_size=len(batch),
        )
        return [
            {name: value for name, value in row.items() if name != "prompt_ids"} | answer.columns()
            for row, answer in zip(batch, answers, strict=True)
        ]

    def on_validation_epoch_start(self) -> None:
        """Begin with the groups of the validation rows."""
        self._sort_rows("validation")
        self._weigh_tokens()

    def on_test_epoch_start(self) -> None:
        """Begin with no answers, and the groups of the test rows."""
        self._answered = []
        self._sort_rows("test")
        self._weigh_tokens()

    def on_test_epoch_end(self) -> None:
        """Log the test, and score the answers of all ranks."""
        super().on_test_epoch_end()
        if not self._answered:
            return
        answers = score_answers(of_all_ranks(self._answered))
        self.log_dict({f"test/{name}": measure.value for name, measure in answers.measures.items()})
        self.evaluation = replace(answers, measures=self.evaluation.measures | answers.measures)

    def log_evaluation(self, prefix: str) -> None:
        """Log what has been gathered, across ranks, and begin anew."""
        values = self.validation.values()
        if "ce" not in values:
            rank_zero_warn(f"{prefix}: no token is supervised, so there is no loss to report.")
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()})
        if prefix == "test":
            self.evaluation = Evaluation(self.validation.measures(values))
        self.validation.reset()


def of_all_ranks(rows: list[Row]) -> list[Row]:
    """The rows that the ranks have answered, in their order, each once. To be asked for on every rank."""
    if dist.is_initialized():
        parts: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    by_id = {row["row_id"]: row for row in rows}
    return [by_id[row_id] for row_id in sorted(by_id)]


def _by_name(state: dict[str, Any], names: Sequence[str]) -> None:
    """Key an optimizer's state by name instead of number, in place; what is keyed by name already stays."""
    groups = state.get("param_groups", [])  # none on ranks that do not write
    if all(isinstance(number, str) for group in groups for number in group["params"]):
        return
    state["state"] = {names[number]: moments for number, moments in state["state"].items()}
    for group in groups:
        group["params"] = [names[number] for number in group["params"]]


def parameter_counts(model: CausalModel) -> tuple[int, int, int]:
    """Parameters in all, active for one token (top-k of the experts), and trained."""
    total = trained = 0
    active = 0.0
    for name, parameter in model.hf.named_parameters():
        total += parameter.numel()
        trained += parameter.numel() * parameter.requires_grad
        active += parameter.numel() * min(visits(name, model.top_k, model.num_experts), 1.0)
    return total, round(active), trained
