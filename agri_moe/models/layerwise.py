"""Layer-wise sparse distillation: every mixture learns to be the feed-forward network whose place it is to take.

    L = sum over layers of  mean |MoE(x) - FFN(x)|^2 / P  +  w (1 - cos(MoE(x), FFN(x)))  +  balance  +  router-z

with P the mean square of FFN(x) over a sample, one number for each layer: without it w would mean another thing in
every layer, since answers grow a hundredfold with depth. It is fixed when a layer begins, so that the loss stays a sum
over tokens. The dense model is frozen; hooks see what its networks read and write. No logits, no gradient through the
model, no activations on disk.

Shapes: B batch, T sequence, N tokens that are no padding, D width, F expert width, E experts, K experts per token,
L layers, V vocabulary.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from agri_moe.callbacks.figures import log_figure
from agri_moe.callbacks.widths import draw_widths
from agri_moe.data.chat import Chat, Segment
from agri_moe.losses import Routing, balance_loss, hidden_distance, routing
from agri_moe.metrics import ReplicationError, RoutingStatistics, TermMean, replication_means
from agri_moe.models.causal import packed_mask
from agri_moe.models.ffn import FFN, describe, find_ffns, instead, only_first_layers, prove, record
from agri_moe.models.moe import Assignment, MoE, RoutingKind, RoutingRule
from agri_moe.models.neurons import Reallocation, move_neurons, plan_move, start_at_random, start_from_dense
from agri_moe.models.replaced import LayerFiles, expert_width, layer_facts, new_moe
from agri_moe.models.source import ModelConfig, check_vocabulary
from agri_moe.models.training import TrainingModule, layer_name
from agri_moe.optimizer import OptimizerConfig
from agri_moe.schedules import RunningMean, Value, bounds, value_at

SOURCE = "model.source"
MEANS = "expert_losses."
START_TOKENS = 8192
"""Tokens that a layer's start looks at; 16 groups then have 512 each to choose their neurons by."""
HEAD_ROWS = 512
"""Positions whose logits are held at a time."""

Batch = dict[str, Any]


class LayerwiseModule(TrainingModule):
    """Mixtures in training beside the frozen dense model that they are to go into.

    In `mode: sequential` the trainer's `max_steps` or `max_epochs` count for each layer, and every layer sees the same
    rows in the same order, as it does in `mode: parallel`: with `inputs: dense` both give the same layers.

    Args:
        source: Folder or hub name of a dense causal model with feed-forward networks of gate, up and down, or of two
            matrices.
        num_experts: Experts of each layer.
        num_experts_per_tok: Experts that each token visits.
        routing: `token_choice`, or `expert_choice`: even load by construction, but a token that nobody chooses gets
            nothing, and who is chosen depends on the other tokens, so that text written token by token is answered by
            another function than was trained; no stock model has it.
        capacity_factor: Room of each expert over its even share of the tokens, with expert choice or `drop_tokens`.
        drop_tokens: With token choice, let experts refuse tokens beyond their room.
        expert_width: Neurons of each expert: a share of the dense network's up to 1, or a number of them; null is
            all of them.
        init_from_dense: Begin with neurons of the dense network, see `start_from_dense`; otherwise at random.
        mode: `parallel`: all layers at once, in the memory of all mixtures, their moments, and what every network reads
            and writes of a micro-batch. `sequential`: one layer after the other in the memory of one; the dense
            model ends after it; finished layers lie in the run's folder, under layers/.
        inputs: Sequential layers read what the `dense` model gives them, or the model whose layers before are
            `replaced` already: these are then all in memory, without gradients.
        learning_rate: Peak learning rate.
        cosine_weight: w above.
        balance_weight: Of the load balance loss of each layer, a number or a schedule.
        router_z_weight: Of the router-z loss of each layer.
        router_noise: What is added to the router's logits in training, where experts are chosen: `gaussian` of standard
            deviation `router_noise_scale`, or `gumbel` times it (at 1 experts are drawn by their probabilities).
        router_noise_scale: A number or a schedule.
        router_temperature: What the router's logits are divided by, a number or a schedule; its value at the end
            stays.
        reallocation: Let experts of high loss grow at the cost of others; null keeps all of one width.
        optimizer: The rest of the optimizer's settings.
        dtype: Type of the dense model in memory.
        attn_implementation: Its attention kernel, by its Hugging Face name.
    """

    dense: PreTrainedModel
    ffns: list[FFN]
    layers: nn.ModuleList
    target_power: Tensor

    def __init__(
        self,
        source: str,
        num_experts: int = 16,
        num_experts_per_tok: int = 2,
        routing: RoutingKind = "token_choice",
        capacity_factor: float = 1.25,
        drop_tokens: bool = False,
        expert_width: int | float | None = None,
        init_from_dense: bool = True,
        mode: Literal["parallel", "sequential"] = "parallel",
        inputs: Literal["dense", "replaced"] = "dense",
        learning_rate: float = 1e-4,
        cosine_weight: float = 0.1,
        balance_weight: Value = 0.01,
        router_z_weight: Value = 0.001,
        router_noise: Literal["none", "gaussian", "gumbel"] = "none",
        router_noise_scale: Value = 1.0,
        router_temperature: Value = 1.0,
        reallocation: Reallocation | None = None,
        optimizer: OptimizerConfig | None = None,
        dtype: Literal["float32", "bfloat16"] = "bfloat16",
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
    ):
        super().__init__()
        self.source = source
        self.num_experts = num_experts
        self.rule = RoutingRule(routing, num_experts_per_tok, capacity_factor, drop_tokens)
        self.expert_width = expert_width
        self.init_from_dense = init_from_dense
        self.mode = mode
        self.inputs = inputs
        self.learning_rate = learning_rate
        self.cosine_weight = cosine_weight
        self.balance_weight = balance_weight
        self.router_z_weight = router_z_weight
        self.router_noise = router_noise
        self.router_noise_scale = router_noise_scale
        self.router_temperature = router_temperature
        self.reallocation = reallocation
        self.optimizer_config = optimizer or OptimizerConfig()
        self.dense_dtype: torch.dtype = getattr(torch, dtype)
        self.model_config = ModelConfig(source, attn_implementation=attn_implementation)
        self.history: list[dict[str, Any]] = []
        self.layer = 0  # the one in training, of a sequential run
        self._single = False  # whether there is one mixture, for one layer after the other
        self._filled = False  # whether the mixtures have weights
        self.rows_again_after: int | None = None  # what the sampler of rows asks
        self._layer_steps = 0
        self._one_layer: tuple[int, int | None] | None = None  # steps and epochs, while the trainer counts all layers
        self._micro = 0  # micro-batches of the optimizer step under way
        self._sums: dict[int, Tensor] = {}  # layer -> what its log is made of, for the step under way
        self._judged: dict[int, Tensor] = {}  # layer -> errors by expert, and tokens, of the step under way
        self._start_batches: list[Batch] = []
        self._replaced: list[MoE] = []  # finished layers, where the next ones read what they say

    # ------------------------------------------------------------------ before anything is loaded

    def check(self, chat: Chat) -> None:
        """Check settings, and that the source has networks to replicate, from its config."""
        self.optimizer_config.check()
        self._check_numbers()
        config = self.model_config.hf_config("model", chat)
        check_vocabulary(self.source, config, chat, SOURCE)
        with torch.device("meta"):
            ffns = find_ffns(AutoModelForCausalLM.from_config(config), f"{SOURCE}: {self.source}")
        width = expert_width(self.expert_width, ffns[0].width)
        if self.reallocation is not None:
            self.reallocation.check(width)
            if self.optimizer_config.name != "adamw":
                raise ValueError(
                    f"model.optimizer.name: {self.optimizer_config.name} has moments that cannot go with a neuron from "
                    "expert to expert; use adamw, or leave model.reallocation out."
                )

    def _check_numbers(self) -> None:
        experts, top_k = self.num_experts, self.rule.top_k
        rules = (
            ("num_experts", experts, experts >= 1, "at least 1"),
            ("num_experts_per_tok", top_k, 1 <= top_k <= experts, f"between 1 and num_experts, {experts}"),
            ("capacity_factor", self.rule.capacity_factor, self.rule.capacity_factor > 0, "above 0"),
            ("cosine_weight", self.cosine_weight, self.cosine_weight >= 0, "at least 0"),
            ("learning_rate", self.learning_rate, self.learning_rate > 0, "above 0"),
            *(
                (name, getattr(self, name), bounds(getattr(self, name))[0] >= 0, "at least 0")
                for name in ("balance_weight", "router_z_weight", "router_noise_scale")
            ),
            ("router_temperature", self.router_temperature, bounds(self.router_temperature)[0] > 0, "above 0"),
        )
        for key, value, holds, demand in rules:
            if not holds:
                raise ValueError(f"model.{key} is {value}: it must be {demand}.")
        if self.rule.kind == "expert_choice" and self.rule.drop:
            raise ValueError("model.drop_tokens is for token_choice; with expert_choice every expert is full anyway.")
        if self.inputs == "replaced" and self.mode == "parallel":
            raise ValueError(
                "model.inputs: replaced needs mode: sequential, where the layers before are finished; or set dense."
            )

    def check_steps(self, max_steps: int) -> None:
        """Any length will do."""

    def setup(self, stage: str) -> None:
        """Check once more where the module is used without the command line; let a sequential run be long enough."""
        super().setup(stage)
        if self.device_mesh is not None:
            raise ValueError(
                "trainer.strategy: layers are trained whole on each GPU; use one GPU or ddp, and mode: sequential "
                "where memory is short."
            )
        if not hasattr(self, "ffns"):
            self.check(self.chat)
        if getattr(self.trainer.datamodule, "group_by", None):  # type: ignore[attr-defined]
            raise ValueError("data.group_by: only language models are validated by group, layers are not; take it out.")
        if stage == "predict":
            raise ValueError("predict answers with a language model: export this run, and use generate --model DIR.")
        if stage == "fit":
            self._layer_steps = self.total_steps()

    # ------------------------------------------------------------------ building

    def configure_model(self) -> None:
        """Load the dense model, and make room for mixtures. Called by Lightning, once per stage; loads once."""
        if hasattr(self, "ffns"):
            if self._single and not self._one_at_a_time:
                raise ValueError(
                    "a module that was trained layer by layer holds one of them: give ckpt_path to a new one."
                )
            return
        hf = self.model_config.load("model", self.chat, self.dense_dtype)
        hf.config.use_cache = False
        # Past nn.Module's own __setattr__: as a submodule it would be saved, trained and moved with us.
        object.__setattr__(self, "dense", hf.eval().requires_grad_(False).to(self.trainer.strategy.root_device))
        key = f"{SOURCE}: {self.source}"
        self.ffns = prove(self.dense, find_ffns(self.dense, key), key)
        rank_zero_info(f"{describe(self.ffns)}, frozen.")
        if self.rule.kind == "expert_choice":
            rank_zero_warn(
                "model.routing: expert_choice: tokens that no expert chooses get nothing from a layer, answers depend "
                "on the batch and so change in decoding token by token, and no stock model can hold it."
            )
        self._build()

    def _build(self) -> None:
        """Empty mixtures, as many as are to be in memory, and what is measured of them."""
        self._single = self._one_at_a_time
        count = 1 if self._single else len(self.ffns)
        width = expert_width(self.expert_width, self.ffns[0].width)
        self.layers = nn.ModuleList(new_moe(self.ffns[0], [width] * self.num_experts, self.rule) for _ in range(count))
        layers = len(self.ffns)
        decay = self.reallocation.decay if self.reallocation else 0.0
        self.expert_losses = nn.ModuleList(
            RunningMean(self.num_experts, decay=decay) for _ in range(count if self.reallocation else 0)
        )
        self.register_buffer("target_power", torch.ones(layers, dtype=torch.float32))
        self.val_replication = ReplicationError(layers)
        self.val_routing = RoutingStatistics(layers, self.num_experts)
        self.val_losses = nn.ModuleDict({"dense": TermMean(), "replaced": TermMean()})
        each = sum(parameter.numel() for parameter in self._moe(0).parameters())
        rank_zero_info(
            f"{layers} mixtures of {self.num_experts} experts of {width} neurons, {self.rule.top_k} active: "
            f"{each:,} parameters each, {each * count:,} in memory."
        )

    @property
    def _one_at_a_time(self) -> bool:
        return self.mode == "sequential" and self.trainer.state.fn == "fit"

    @property
    def files(self) -> LayerFiles:
        """Where finished layers lie."""
        return LayerFiles(self.trainer)

    @property
    def indices(self) -> list[int]:
        """The layers that `layers` holds mixtures for."""
        return [self.layer] if self._one_at_a_time else list(range(len(self.layers)))

    def _moe(self, slot: int) -> MoE:
        moe = self.layers[slot]
        assert isinstance(moe, MoE)
        return moe

    def _moes(self) -> list[tuple[int, MoE]]:
        return [(layer, self._moe(slot)) for slot, layer in enumerate(self.indices)]

    def _plan_layers(self) -> None:
        """Make a sequential run as many times as long as it has layers, with the same rows for each."""
        loop: Any = self.trainer.fit_loop
        steps, layers, accumulate = self._layer_steps, len(self.ffns), self.trainer.accumulate_grad_batches
        if getattr(self.trainer.datamodule, "streaming", False):  # type: ignore[attr-defined]
            rank_zero_warn("model.mode: sequential: streamed rows go on from layer to layer, each sees others.")
        else:
            batches, per_epoch = self._epoch_batches(), self._epoch_steps()
            rest = steps % per_epoch * accumulate
            if rest and batches % accumulate:
                raise ValueError(
                    f"trainer.accumulate_grad_batches {accumulate} does not divide the {batches} micro-batches of an "
                    f"epoch, and a layer ends within one: set trainer.limit_train_batches to "
                    f"{batches // accumulate * accumulate}, or whole epochs as trainer.max_epochs."
                )
            self.rows_again_after = steps // per_epoch * batches + rest
        self._one_layer = self.trainer.max_steps, self.trainer.max_epochs
        if self.trainer.max_steps > 0:
            loop.epoch_loop.max_steps = steps * layers
        else:
            loop.max_epochs = self.trainer.max_epochs * layers  # type: ignore[operator]

    def teardown(self, stage: str) -> None:
        """Let the trainer count one layer again."""
        if self._one_layer is not None:
            loop: Any = self.trainer.fit_loop
            loop.epoch_loop.max_steps, loop.max_epochs = self._one_layer
            self._one_layer = None

    # ------------------------------------------------------------------ the start of a layer

    def on_fit_start(self) -> None:
        """Start what no checkpoint has filled; before the trainer's progress is restored, so from the first rows."""
        if self._single:
            self._start_batches = self._first_batches()
            self._plan_layers()
        self._start()

    def on_validation_start(self) -> None:
        """Without a checkpoint it is the start that is scored."""
        self._start()

    on_test_start = on_validation_start

    def _start(self) -> None:
        if self._filled:
            return
        self._start_batches = self._start_batches or self._first_batches()
        self._begin(self.indices)
        self._filled = True
        if not self._single:
            self._start_batches = []

    def _first_batches(self) -> list[Batch]:
        """Micro-batches from the beginning of the training rows, until there are tokens enough to start from."""
        found: list[Batch] = []
        tokens = 0
        for batch in self.trainer.datamodule.train_dataloader():  # type: ignore[attr-defined]
            batch = self.on_before_batch_transfer(batch, 0)
            found.append({name: batch[name] for name in ("input_ids", "position_ids", "positions")})
            tokens += len(batch["positions"])
            if tokens >= START_TOKENS:
                break
        return found

    @torch.inference_mode(False)  # in which a validation would run: a router is fitted
    @torch.no_grad()
    def _begin(self, layers: Sequence[int]) -> None:
        """Start the mixtures in memory as those of these layers."""
        device = self.trainer.strategy.root_device
        pairs = []
        for batch in self._start_batches:
            with self.trainer.precision_plugin.forward_context():
                pairs.append(self._read({name: tensor.to(device) for name, tensor in batch.items()}, layers))
        width = expert_width(self.expert_width, self.ffns[0].width)
        for slot, layer in enumerate(layers):
            parts = zip(*(pair[slot] for pair in pairs), strict=True)
            x_ND, y_ND = (torch.cat(part)[:START_TOKENS] for part in parts)
            moe, ffn = self._moe(slot), self.ffns[layer]
            generator = torch.Generator().manual_seed(hash((self.seed, layer)) % 2**32)
            moe.set_widths([width] * self.num_experts)
            if self.init_from_dense:
                start_from_dense(moe, ffn, x_ND, generator)
            else:
                start_at_random(moe, ffn.down.weight.float().std().item(), generator)
            if self.reallocation is not None:
                self._expert_loss(slot).reset()
                self._note(layer, moe)
            self.target_power[layer] = y_ND.float().square().mean().to(self.target_power.device)
        if self.trainer.world_size > 1:  # each rank has looked at rows of its own
            for tensor in (*self.layers.state_dict().values(), self.target_power):
                tensor.copy_(self.trainer.strategy.broadcast(tensor))

    # ------------------------------------------------------------------ from layer to layer

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Go on to the next layer when it is time; follow the schedules."""
        if self._one_at_a_time:
            due = min(self.global_step // self._layer_steps, len(self.ffns) - 1)
            if due != self.layer:
                self._finish()
                self.layer = due
                self.trainer.optimizers[0].state.clear()
                self._begin([due])
                self._unlog()
        self._micro = batch_idx % self.trainer.accumulate_grad_batches
        due = self.reallocation is not None and self.layer_step % self.reallocation.every_n_steps == 0
        if due and self.layer_step and not self._micro:
            self._reallocate(batch)
        if self.layer_step == 0 and self._micro == 0 and self._one_at_a_time:
            rank_zero_info(f"Layer {self.layer + 1} of {len(self.ffns)}: {self._layer_steps} steps.")
        for _, moe in self._moes():
            moe.temperature.fill_(value_at(self.router_temperature, self.layer_step))

    @property
    def layer_step(self) -> int:
        """Optimizer steps done with the layers in training: what schedules count."""
        return self.global_step % self._layer_steps if self._one_at_a_time else self.global_step

    def _finish(self) -> None:
        """Put the layer that was in training away."""
        moe = self._moe(0)
        if self.trainer.is_global_zero:
            self.files.write(self.layer, moe)
        if self.inputs == "replaced":
            self._replaced.append(copy.deepcopy(moe).requires_grad_(False))

    def on_train_end(self) -> None:
        """Put the last layer away, if training has come to its end."""
        if self._one_at_a_time and self.global_step >= self._layer_steps * len(self.ffns):
            self._finish()

    # ------------------------------------------------------------------ neurons change hands

    def _expert_loss(self, slot: int) -> RunningMean:
        mean = self.expert_losses[slot]
        assert isinstance(mean, RunningMean)
        return mean

    @torch.no_grad()
    def _reallocate(self, batch: Batch) -> None:
        """Give experts of high loss neurons of others, judged by the tokens of this micro-batch on all ranks."""
        assert self.reallocation is not None, "asked before"
        with self.trainer.precision_plugin.forward_context():
            pairs = self._read(batch, self.indices)
        for slot, ((layer, moe), (x_ND, _)) in enumerate(zip(self._moes(), pairs, strict=True)):
            losses = self._expert_loss(slot).value.tolist()
            widths = self.reallocation.widths(moe.widths, losses)
            if widths == list(moe.widths):
                continue
            strength_S = self.trainer.strategy.reduce(moe.strengths(x_ND), reduce_op="sum")
            before_ND = moe(x_ND).output_ND
            generator = torch.Generator().manual_seed(hash((self.seed, self.layer_step, layer)) % 2**32)
            move_neurons(moe, widths, plan_move(moe, widths, strength_S), self.trainer.optimizers[0], generator)
            change = (moe(x_ND).output_ND - before_ND).norm() / before_ND.norm().clamp(min=1e-12)
            self._note(layer, moe, losses=losses, change=change.item())
        log_figure(self.trainer, "expert_widths", draw_widths(self.history))

    def _note(self, layer: int, moe: MoE, **more: Any) -> None:
        self.history.append({"layer": layer, "step": self.layer_step, "widths": list(moe.widths)} | more)

    # ------------------------------------------------------------------ steps

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Find the places of tokens and targets on the CPU, where it costs no synchronisation with the device."""
        return batch | {
            "positions": (batch["segment_ids"] != Segment.PAD).flatten().nonzero()[:, 0],
            "target_positions": (batch["target_segments"] != Segment.PAD).flatten().nonzero()[:, 0],
        }

    def _run(self, batch: Batch) -> Tensor:
        """The dense model without its head, [B, T, D]; hooks may see or change what its networks say."""
        return self.dense.base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=packed_mask(self.dense.config, batch["position_ids"]),
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def _read(self, batch: Batch, layers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What these networks, consecutive ones, read and write [N, D]."""
        ffns = [self.ffns[layer] for layer in layers]
        before = self._replaced[: layers[0]]
        with (
            only_first_layers(self.dense, ffns[-1]),
            instead(self.ffns[: len(before)], before, batch["positions"]),
            record(ffns, batch["positions"]) as pairs,
        ):
            self._run(batch)
        return pairs

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One micro-batch: what the dense model's networks say, and every mixture's loss on it."""
        if not len(batch["positions"]):  # the last micro-batches of an epoch may be empty, on some ranks
            return {"loss": torch.stack([p.sum() for p in self.layers.parameters()]).sum() * 0.0, "routing": None}
        pairs = self._read(batch, self.indices)
        learned = [
            self._learn(layer, moe, *pair, batch) for (layer, moe), pair in zip(self._moes(), pairs, strict=True)
        ]
        losses, routed = zip(*learned, strict=True)
        return {"loss": torch.stack(losses).sum(), "routing": None if self._one_at_a_time else _joined(routed)}

    def _learn(self, layer: int, moe: MoE, x_ND: Tensor, y_ND: Tensor, batch: Batch) -> tuple[Tensor, Routing]:
        """One layer's loss, divided by the tokens of the whole optimizer step, and what its router did."""
        out = moe(x_ND, self._noise(layer, x_ND))
        squared_N = (out.output_ND.float() - y_ND.float()).square().mean(-1)
        distance_N = hidden_distance(out.output_ND, y_ND, "cosine")
        error_N = squared_N / self.target_power[layer] + self.cosine_weight * distance_N
        routed = self._routing(out.logits_NE, out.assignment.load_E)
        balance = balance_loss(routed)[0]
        step = self.layer_step
        if self.reallocation is not None:
            self._judge(layer, error_N.detach(), out.assignment)
        per_token = self.replicas / batch["step_tokens"].clamp(min=1).float()
        per_batch = self.replicas / batch["step_batches"].clamp(min=1).float()
        loss = per_token * error_N.sum() + value_at(self.balance_weight, step) * per_batch * balance
        loss = loss + value_at(self.router_z_weight, step) * per_token * routed.z_sum
        power_N = y_ND.float().square().mean(-1)
        sums = [squared_N.sum(), power_N.sum(), (1 - distance_N).sum(), routed.tokens, balance, routed.z_sum]
        seen = torch.stack([*(value.detach().float() for value in sums), torch.ones_like(routed.tokens)])
        self._sums[layer] = self._sums[layer] + seen if layer in self._sums else seen
        return loss, routed

    def _judge(self, layer: int, error_N: Tensor, assignment: Assignment) -> None:
        """Add each expert's part in the errors of its tokens to those of the step."""
        part_A = assignment.weight_A.detach().float() * error_N[assignment.token_A]
        loss_E = torch.zeros(self.num_experts, device=part_A.device).index_add(0, assignment.experts, part_A)
        seen = torch.cat([loss_E, loss_E.new_tensor([len(error_N)])])
        self._judged[layer] = self._judged[layer] + seen if layer in self._judged else seen

    def _routing(self, logits_NE: Tensor, load_E: Tensor) -> Routing:
        everyone_N = torch.ones_like(logits_NE[:, 0], dtype=torch.bool)
        load_LE = load_E[None].float()
        return routing([logits_NE], self.rule.top_k, everyone_N, load_LE)._replace(wanted_LE=load_LE)

    def _noise(self, layer: int, x_ND: Tensor) -> Tensor | None:
        """For the choice of experts [N, E]: a function of seed, step of the layer, micro-batch, rank and layer."""
        scale = value_at(self.router_noise_scale, self.layer_step)
        if self.router_noise == "none" or scale == 0:
            return None
        place = (self.seed, self.layer_step, self._micro, self.global_rank, layer)
        generator = torch.Generator(x_ND.device).manual_seed(hash(place) % 2**63)
        noise_NE = torch.empty(len(x_ND), self.num_experts, device=x_ND.device)
        if self.router_noise == "gaussian":
            return scale * noise_NE.normal_(generator=generator)
        return -scale * noise_NE.exponential_(generator=generator).log()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the finished step: means over its tokens, and over layers."""
        layers = self.indices
        nothing = torch.zeros(7, device=self.device)  # on a rank whose micro-batches were all empty
        sums = torch.stack([self._sums.get(layer, nothing) for layer in layers])
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        self._sums.clear()
        values = replication_means(sums[:, :4])
        values |= {"balance": sums[:, 4] / sums[:, 6], "router_z": sums[:, 5] / sums[:, 3].clamp(min=1)}
        self.log_dict({f"train/{name}": value.mean() for name, value in values.items()}, prog_bar=True)
        for name in ("relative_error", "cosine"):
            self.log_dict({layer_name(f"train/{name}", i): v for i, v in zip(layers, values[name], strict=True)})
        self.log("train/learning_rate", self.learning_rate * self._schedule(self.global_step))
        nothing = torch.zeros(self.num_experts + 1, device=self.device)
        for slot, layer in enumerate(layers if self.reallocation else []):
            seen = self.trainer.strategy.reduce(self._judged.get(layer, nothing), reduce_op="sum")
            self._expert_loss(slot).update(seen[:-1] / seen[-1].clamp(min=1), seen[-1] > 0)
        self._judged.clear()
        if self._one_at_a_time:
            self.log("layer", float(self.layer + 1), prog_bar=True)

    def configure_optimizers(self) -> Any:
        """AdamW or its like over matrices, which decay, and vectors; warm-up and cosine over each layer's steps."""
        groups = []
        for decayed in (True, False):
            parameters = [p for p in self.layers.parameters() if (p.ndim > 1) == decayed]
            decay = self.optimizer_config.weight_decay if decayed else 0.0
            if parameters:
                groups.append({"params": parameters, "lr": self.learning_rate, "weight_decay": decay})
        optimizer = self.optimizer_config.build(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _schedule(self, step: int) -> float:
        step = step % self._layer_steps if self._one_at_a_time else step
        warmup = self.optimizer_config.warmup_steps
        return self.optimizer_config.factor(step, warmup=warmup, total=self._layer_steps)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each layer by itself, as in a run of that layer alone."""
        if not gradient_clip_val:
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        norms = [clip(list(moe.parameters()), gradient_clip_val) for _, moe in self._moes()]
        if gradient_clip_algorithm != "value":
            self.log("train/gradient_norm", torch.stack([norm for norm in norms if norm is not None]).mean())

    # ------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Errors of every layer, and the text's likelihood under the dense model and with its networks replaced."""
        if not len(batch["positions"]):
            return
        for (layer, moe), (x_ND, y_ND) in zip(self._moes(), self._read(batch, self.indices), strict=True):
            out = moe(x_ND)
            cosine_N = 1 - hidden_distance(out.output_ND, y_ND, "cosine")
            y_ND = y_ND.float()
            squared_N = (out.output_ND.float() - y_ND).square().mean(-1)
            self.val_replication.update(layer, squared_N, y_ND.square().mean(-1), cosine_N)
            self.val_routing.update(self._placed(layer, self._routing(out.logits_NE, out.assignment.load_E)))
        nll = self._score(batch)
        self._loss("dense").update(nll.sum(), torch.tensor(len(nll)))
        first = self.indices[0]
        moes = [*self._replaced[:first], *(moe for _, moe in self._moes())]
        ffns = self.ffns[first - len(moes) + len(self.indices) : first + len(self.indices)]
        with instead(ffns, moes, batch["positions"]):
            nll = self._score(batch)
        self._loss("replaced").update(nll.sum(), torch.tensor(len(nll)))

    test_step = validation_step

    def _loss(self, name: str) -> TermMean:
        loss = self.val_losses[name]
        assert isinstance(loss, TermMean)
        return loss

    def _placed(self, layer: int, routed: Routing) -> Routing:
        """One layer's routing among zeros for the others; tokens count once."""
        load_LE = torch.zeros(len(self.ffns), self.num_experts, device=routed.load_LE.device)
        entropy_L = torch.zeros(len(self.ffns), device=load_LE.device)
        load_LE[layer], entropy_L[layer] = routed.load_LE[0], routed.entropy_L[0]
        tokens = routed.tokens * (layer == self.indices[0])
        return routed._replace(load_LE=load_LE, entropy_L=entropy_L, tokens=tokens)

    @torch.no_grad()
    def _score(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each target in nats [N], a few logits at a time."""
        hidden_ND = self._run(batch).flatten(0, 1)[batch["target_positions"]]
        targets_N = batch["target_ids"].flatten()[batch["target_positions"]]
        head = self.dense.get_output_embeddings()
        cap = getattr(self.dense.config, "final_logit_softcapping", None)
        losses = [torch.zeros(0, device=hidden_ND.device)]
        for hidden, targets in zip(hidden_ND.split(HEAD_ROWS), targets_N.split(HEAD_ROWS), strict=True):
            logits = head(hidden).float()
            logits = cap * torch.tanh(logits / cap) if cap else logits
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(losses)

    def log_evaluation(self, prefix: str) -> None:
        """Log what has been gathered, across ranks, and begin anew."""
        routed = self.val_routing.compute()
        values = self.val_replication.compute()
        if routed:
            values |= {"balance_score": routed["balance"], "router_entropy": routed["normalized_entropy"]}
            values |= {"dead_experts": routed["dead"]}
        logged: dict[str, Tensor] = {}
        for name, value_L in values.items():
            logged[f"{prefix}/{name}"] = value_L[self.indices].mean()
            logged |= {layer_name(f"{prefix}/{name}", layer): value_L[layer] for layer in self.indices}
        for name in self.val_losses:
            if (loss := self._loss(name).compute()) is not None:
                key = "ce" if name == "replaced" else f"ce_{name}"
                logged |= {f"{prefix}/{key}": loss, f"{prefix}/{key.replace('ce', 'perplexity')}": loss.exp()}
        self.log_dict(logged)
        for used in (self.val_replication, self.val_routing, *map(self._loss, self.val_losses)):
            used.reset()

    # ------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Beside the weights: what they are, which layer is in training, and what has happened."""
        checkpoint["layerwise"] = layer_facts(self.source, self.ffns, self.num_experts, self.rule) | {
            "mode": self.mode,
            "layer": self.layer,
            "layer_steps": self._layer_steps,
            "history": self.history,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the layer that was in training; for an evaluation put all layers in their places."""
        if "layerwise" not in checkpoint:
            raise ValueError("the checkpoint is not of a LayerwiseModule: give one of the run's own.")
        facts, state = checkpoint["layerwise"], checkpoint["state_dict"]
        self._filled = True
        self.history = facts["history"]
        if self.trainer.state.fn == "fit" and facts["mode"] != self.mode:
            raise ValueError(f"the checkpoint was made with mode: {facts['mode']}: set model.mode as it was.")
        if self._one_at_a_time:
            if facts["layer_steps"] != self._layer_steps:
                raise ValueError(
                    f"trainer.max_steps or max_epochs give each layer {self._layer_steps} steps, the checkpoint "
                    f"was made with {facts['layer_steps']}: set them as they were."
                )
            self.layer = facts["layer"]
            if self.trainer.is_global_zero:
                self.files.bring(self.layer)
            self.trainer.strategy.barrier()
            if self.inputs == "replaced":
                for layer in range(self.layer):
                    moe = copy.deepcopy(self._moe(0))
                    moe.load_state_dict(self.files.read(layer))
                    self._replaced.append(moe.requires_grad_(False))
        elif facts["mode"] == "sequential":
            self.layers = self.layers[: facts["layer"] + 1]  # of a run that has not come further
            self.expert_losses = self.expert_losses[: facts["layer"] + 1]
            state = checkpoint["state_dict"] = self.files.gathered(state, facts["layer"])
        # Running means begin afresh where the checkpoint has none, and are dropped where none are asked for.
        means = {name: tensor for name, tensor in self.state_dict().items() if name.startswith(MEANS)}
        for name in [name for name in state if name.startswith(MEANS) and name not in means]:
            del state[name]
        state.update({name: tensor for name, tensor in means.items() if name not in state})


def _joined(routed: Sequence[Routing]) -> Routing:
    """The routing of several layers, of the same tokens, as one."""
    return Routing(
        load_LE=torch.cat([one.load_LE for one in routed]),
        wanted_LE=torch.cat([one.wanted_LE for one in routed]),
        probability_LE=torch.cat([one.probability_LE for one in routed]).detach(),
        entropy_L=torch.cat([one.entropy_L for one in routed]),
        z_sum=torch.stack([one.z_sum for one in routed]).mean().detach(),
        tokens=routed[0].tokens,
    )
