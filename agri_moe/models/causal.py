"""A Hugging Face causal language model that stops before its head.

The losses read hidden states and the head's weight, never logits of shape [tokens, vocabulary]. They are computed
inside this module's forward: under FSDP2 it is the root, and only there is a tied head whole and its gradient reduced.

Shapes: B batch, T sequence, N chosen positions, S sampled positions, Q query positions of a sequence, G key-value
groups, D width, F expert width, V vocabulary, E experts.
"""

from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from agri_moe.models.attention import capture_attention
from agri_moe.models.checkpoint_files import NewRows, leans, start_row
from agri_moe.models.experts import follow_autocast
from agri_moe.models.routing import POSITIONS, Routers, RoutingConfig
from agri_moe.models.sharding import place, rows

R = TypeVar("R")


class Reads(NamedTuple):
    """What is read on the way through the layers, beside hidden states and head at the end."""

    layers: Sequence[int] = ()  # residual streams after these layers, at batch["sample"]
    attention: Sequence[int] = ()  # attention of these layers, at batch["queries"]
    experts: bool = False  # outputs of all experts, for the tokens at batch["expert_sample"]


NOTHING = Reads()


class Forward(NamedTuple, Generic[R]):
    """What a forward pass returns."""

    read: R  # what `read` made of hidden states and head
    router_logits: list[Tensor]  # one [B*T, E] per MoE layer, first layer first
    layers: dict[int, Tensor]  # layer -> its residual stream [S, D]
    projected: dict[tuple[int, int], Tensor]  # pair of layers -> the stream in the other's width
    attention: dict[int, Tensor]  # layer -> [B, G, Q, T], mean over each of the G key-value groups
    experts: list[Tensor]  # one [E, S, D] per MoE layer, first layer first
    loads: Sequence[Tensor] = ()  # as `Routers.end_pass` has them; empty where the routers are the stock ones


class CausalModel(nn.Module):
    """Backbone, chosen positions, head.

    Args:
        hf: Any causal model with `.model` (the backbone, with `.layers`) and `.lm_head`, as Qwen, Llama, Mistral and
            their MoE forms have.
        projections: Pair of layers -> width of the other model, where a residual stream is to be projected to it. The
            projections are trained with the model, and no part of what is exported.
        routing: How its routers choose; None leaves them as they are.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        projections: dict[tuple[int, int], int] | None = None,
        routing: RoutingConfig | None = None,
    ):
        super().__init__()
        self.hf = hf
        follow_autocast(hf)
        width = hf.config.hidden_size
        self.projections = nn.ModuleDict(
            {f"{i}_{j}": nn.Linear(width, other, bias=False) for (i, j), other in (projections or {}).items()}
        )
        self.routing = None if routing is None else Routers(hf, routing)
        self.layer_dtype: torch.dtype | None = None  # in which a sharded model's layers are gathered, if not their own
        self._asked_sample: Tensor | None = None  # of the pass that is about to begin
        self._expert_sample: Tensor | None = None  # of the last pass, which the backward pass may run again
        self._expert_outputs: dict[int, Tensor] | None = None
        hf.model.register_forward_pre_hook(self._begin_pass)
        for i, layer in enumerate(hf.model.layers):
            if hasattr(layer.mlp, "experts"):
                layer.mlp.register_forward_hook(partial(self._run_all_experts, i))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CausalModel":
        # `module.to(torch.bfloat16)`, Lightning's bf16-true, would round the frequencies of rotary positions: by a
        # whole turn some hundred tokens on. transformers keeps them in float32 whatever the type of the weights.
        before = [(m, name, b) for m in self.hf.modules() for name, b in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, buffer in before:
            after = module.get_buffer(name)
            if after.dtype != buffer.dtype:
                setattr(module, name, buffer.to(after.device))
        return self

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.hf.model.layers)

    @property
    def routers(self) -> list[Any]:
        """The routers of the MoE layers, first layer first; empty for a dense model."""
        return [layer.mlp.gate for layer in self.hf.model.layers if hasattr(layer.mlp, "experts")]

    @property
    def num_experts(self) -> int:
        """Experts per MoE layer; 0 for a dense model."""
        return self.routers[0].num_experts if self.routers else 0

    @property
    def top_k(self) -> int:
        """Experts per token; 0 for a dense model."""
        return self.routers[0].top_k if self.routers else 0

    def forward(
        self,
        batch: dict[str, Tensor],
        positions_N: Tensor,
        read: Callable[[Tensor, Tensor], R],
        reads: Reads = NOTHING,
    ) -> Forward[R]:
        """Run the backbone on a packed batch and hand hidden states and head to `read`.

        Args:
            batch: `input_ids` and `position_ids` [B, T] (positions restart at each packed row), and what `reads` needs:
                `sample` (and `hidden_sample`), `queries`, `expert_sample`; with routing of its own `token_positions`.
            positions_N: Flat indices b T + t of the positions that `read` sees.
            read: Takes (hidden_ND, head_VD).
            reads: What else is wanted.
        """
        backbone = self.hf.model
        routers = self.routers
        self._asked_sample = batch["expert_sample"] if reads.experts else None
        if self.routing is not None:
            self.routing.expect(batch[POSITIONS])
        experts: dict[int, Tensor] = {}
        self._expert_outputs = experts
        with (
            self._precision(),
            capture(routers) as router_logits,
            capture([backbone.layers[i] for i in reads.layers], batch.get("sample")) as streams,
            capture_attention([backbone.layers[i] for i in reads.attention], batch) as attention,
        ):
            # No cache: with one, transformers would take packed rows for a single one.
            hidden_BTD = backbone(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                attention_mask=packed_mask(self.hf.config, batch["position_ids"]),
                use_cache=False,
            ).last_hidden_state
        self._expert_outputs = None
        layers = dict(zip(reads.layers, streams, strict=True))
        return Forward(
            read=read(hidden_BTD.flatten(0, 1)[positions_N], self.hf.lm_head.weight),
            router_logits=router_logits,
            layers=layers,
            projected=self._project(layers, batch, hidden_BTD),
            attention=dict(zip(reads.attention, attention, strict=True)),
            experts=list(experts.values()),
            loads=() if self.routing is None else self.routing.end_pass(),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is, or this rank's pieces of it."""
        return self.hf.device

    def generate(self, **options: Any) -> Any:
        """Go on from prompts as the language model's own `generate` does; of a sharded model, on all ranks at once."""
        with self._precision():
            return self.hf.generate(**options)

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast where the layers' weights have another type than what flows through them: callers may have none."""
        if self.layer_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.layer_dtype)

    def _project(
        self, layers: dict[int, Tensor], batch: dict[str, Tensor], hidden_BTD: Tensor
    ) -> dict[tuple[int, int], Tensor]:
        projected = {}
        for name, projection in self.projections.items():
            student, other = map(int, name.split("_"))
            if "hidden_sample" in batch and student in layers:
                x = layers[student][batch["hidden_sample"]]
            else:  # the term is off, in this stage or step: it is in the graph all the same, which DDP asks for
                x = hidden_BTD.flatten(0, 1)[:0]
            projected[student, other] = projection(x)
        return projected

    def _begin_pass(self, *_: Any) -> None:
        """A pass that does not come from `forward`, such as one of generation, has asked for nothing."""
        self._expert_sample, self._asked_sample = self._asked_sample, None
        if self.routing is not None:
            self.routing.begin_pass()

    def _run_all_experts(self, layer: int, block: Any, args: tuple[Tensor, ...], _: Tensor) -> None:
        """Every expert on the sampled tokens.

        A hook that stays: activation checkpointing runs the layer again in the backward pass, and must find there the
        operations of the first time; and under FSDP2 only inside the layer are its weights whole.
        """
        if self._expert_sample is None:
            return
        experts, x_SD = block.experts, args[0].flatten(0, 1)[self._expert_sample]
        # Weights on the left: their gradients then come in their own layout, and need no transposed copy.
        gate_EFS, up_EFS = (experts.gate_up_proj @ x_SD.T).chunk(2, dim=1)
        outputs_ESD = (experts.down_proj @ (experts.act_fn(gate_EFS) * up_EFS)).transpose(1, 2)
        if self._expert_outputs is not None:
            self._expert_outputs[layer] = outputs_ESD


def packed_mask(config: PreTrainedConfig, position_ids_BT: Tensor) -> Tensor | None:
    """Who sees whom, [B, 1, T, T]; None where transformers derives it from `position_ids`.

    It does so for every kernel, but asks the device whether there is more than one row, and so waits for all work
    that is under way: with sdpa, twice in a step of student and teacher.
    """
    windows = getattr(config, "sliding_window", None), *(getattr(config, "layer_types", None) or ())
    if config._attn_implementation != "sdpa" or set(windows) - {None, "full_attention"}:
        return None
    rows_BT = (position_ids_BT == 0).cumsum(1)
    same_BTT = rows_BT[:, :, None] == rows_BT[:, None, :]
    return same_BTT.tril()[:, None]


@contextmanager
def capture(modules: Sequence[nn.Module], sample_S: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Collect the first output of each module during one forward pass, or a sample of it, in the order given.

    The hooks are gone when the block ends, so the second run that activation checkpointing makes in the backward pass
    is not counted; and they keep references only, since that run must find the same operations. Without gradient there
    is no second run: the sample is taken at once, and the rest let go.

    Args:
        modules: Whose outputs are wanted.
        sample_S: Flat indices into an output [B, T, D]; None takes all of it.
    """
    outputs: list[Tensor] = []
    by_module: dict[int, Tensor] = {}

    def sampled(output: Tensor) -> Tensor:
        return output if sample_S is None else output.flatten(0, 1)[sample_S]

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        by_module[id(module)] = first if torch.is_grad_enabled() else sampled(first)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
        for module in modules:
            output = by_module[id(module)]
            outputs.append(sampled(output) if torch.is_grad_enabled() else output)
    finally:
        for handle in handles:
            handle.remove()


def grow(model: PreTrainedModel, tokens: Collection[int]) -> None:
    """Make room for these token ids in embedding and head, in place, before they are sharded.

    Where the padded matrix has free rows, as Qwen's does, it does not grow; otherwise it grows to the next multiple of
    128.
    """
    if max(tokens, default=0) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(tokens) + 1, pad_to_multiple_of=128, mean_resizing=False)


def start_rows(model: PreTrainedModel, pieces: NewRows, merged: Container[int] = (), stored: int | None = None) -> None:
    """Start the embedding rows of new tokens as the mean of the rows of their plain-text pieces, in place.

    Those of merged tokens lean to one side in a model with a head of its own, see `leans`.

    Rows that only fill the matrix up start as the mean of all that are stored, see `ExtendedTensor`.

    Args:
        model: Its input embedding and, if untied, its head are changed; they grow where they must (see `grow`). Of a
            sharded model, which cannot grow, every rank must call this.
        pieces: Id of each new token -> ids of its pieces.
        merged: Tokens that stand in text for their pieces; the others are markers.
        stored: Rows that the model had before it grew; by default all that it has now.
    """
    if not pieces:
        return
    if stored is None:
        stored = len(model.get_input_embeddings().weight)
    grow(model, pieces)
    matrices = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not matrices[0]:
        matrices.append(head.weight)
    with torch.no_grad():
        for weight_VD, lean in zip(matrices, leans(tied=len(matrices) == 1), strict=False):
            if len(weight_VD) > stored:
                runs = torch.arange(stored).split(1 << 13)
                mean_D = torch.stack([rows(weight_VD, run).double().sum(0) for run in runs]).sum(0) / stored
                place(weight_VD, mean_D.expand(len(weight_VD) - stored, -1), (stored, 0))
            for token, parts in pieces.items():
                row_D = start_row(rows(weight_VD, parts), lean if token in merged else 0.0)
                place(weight_VD, row_D, (token, 0))
