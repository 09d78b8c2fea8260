"""A dense model whose feed-forward networks are replaced: from a layer-wise checkpoint, and into a stock model.

A layer-wise checkpoint holds the mixtures and what they are (`layerwise`: see `layer_facts`), and the name of the dense
model that the rest comes from. Of a sequential run it holds the layer in training; those before it lie beside the
checkpoints as RUN/layers/layer_NN.safetensors.

Shapes: E experts, D model width, F width of the widest expert, S neurons of all experts.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from agri_moe.data.chat import Chat
from agri_moe.models.ffn import FFN, find_ffns, prove, put_in_place
from agri_moe.models.moe import MoE, Replacement, RoutingRule
from agri_moe.models.source import ModelConfig
from agri_moe.models.upcycle import FAMILIES, UpcycleSpec, moe_config

if TYPE_CHECKING:
    from lightning import Trainer

PREFIX = "layers."
"""Where the mixtures stand in a checkpoint's state."""
ALIGNED = 16
"""A stock model's experts are as wide as a multiple of this: its grouped products want rows of whole 16 bytes."""


def expert_width(asked: int | float | None, dense_width: int) -> int:
    """Neurons of an expert.

    Args:
        asked: A share up to 1, a number, or None for all of the dense network's.
        dense_width: How many that has.

    Raises:
        ValueError: If it is no whole number of neurons between 1 and the dense network's.
    """
    if asked is None:
        return dense_width
    width = asked * dense_width if asked <= 1 else asked
    if not 1 <= width <= dense_width or width != int(width):
        raise ValueError(
            f"model.expert_width is {asked}: it must be a share up to 1 that gives whole neurons, or a number of them "
            f"up to the dense network's {dense_width:,}."
        )
    return int(width)


def new_moe(ffn: FFN, widths: Sequence[int], rule: RoutingRule) -> MoE:
    """An empty mixture in the form of a network."""
    own = ffn.weights()
    return MoE(
        ffn.down.out_features,
        widths,
        rule,
        ffn.act_fn,
        gated=ffn.gated,
        inner_bias="up_bias_S" in own,
        output_bias="bias_D" in own,
    )


def layer_facts(source: str, ffns: Sequence[FFN], num_experts: int, rule: RoutingRule) -> dict[str, Any]:
    """What a checkpoint says of its mixtures, in types that load without running code."""
    down = ffns[0].down
    return {
        "source": source,
        "rule": asdict(rule),
        "num_experts": num_experts,
        "num_layers": len(ffns),
        "width": down.out_features,
        "dense_width": down.in_features,
        "gated": ffns[0].gated,
        "dtype": str(down.weight.dtype).removeprefix("torch."),
    }


class LayerFiles:
    """The finished layers of a sequential run, one file each.

    Args:
        trainer: Its checkpoints' folder says where they lie, and the checkpoint that it loads where others may.
    """

    def __init__(self, trainer: "Trainer"):
        callback: Any = trainer.checkpoint_callback
        folder = Path(callback.dirpath).parent if callback and callback.dirpath else Path(trainer.default_root_dir)
        self.folder = folder / "layers"
        self.checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path else None

    def write(self, layer: int, moe: MoE) -> None:
        """Write a finished layer, whole or not at all."""
        path = _layer_file(self.folder, layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({name: tensor.contiguous().cpu() for name, tensor in moe.state_dict().items()}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def read(self, layer: int) -> dict[str, Tensor]:
        """The state of a finished layer."""
        return read_layer(self.folder, layer)

    def bring(self, finished: int) -> None:
        """Copy the finished layers of another run, which this one goes on from."""
        assert self.checkpoint is not None, "they belong to a checkpoint"
        source = self.checkpoint.parent.parent / "layers"
        if source.resolve() == self.folder.resolve():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for layer in range(finished):
            read_layer(source, layer)
            shutil.copyfile(_layer_file(source, layer), _layer_file(self.folder, layer))

    def gathered(self, state: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
        """The state of a run's checkpoint with the finished layers before the one in training."""
        assert self.checkpoint is not None, "the state is of a checkpoint"
        return gather_layers(state, layer, self.checkpoint.parent.parent / "layers")


def gather_layers(state: Mapping[str, Tensor], layer: int, folder: Path) -> dict[str, Tensor]:
    """The mixtures of all layers up to this one, where the state has it alone and files have those before."""
    first = f"{PREFIX}0."
    found = {
        name.replace(first, f"{PREFIX}{layer}.", 1) if name.startswith(first) else name: tensor
        for name, tensor in state.items()
    }
    for before in range(layer):
        found |= {f"{PREFIX}{before}.{name}": tensor for name, tensor in read_layer(folder, before).items()}
    return found


def read_layer(folder: Path, layer: int) -> dict[str, Tensor]:
    """The state of a finished layer.

    Raises:
        ValueError: If its file is missing or damaged.
    """
    path = _layer_file(folder, layer)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is missing or damaged: a sequential run's finished layers must lie beside its checkpoints."
        ) from error


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer_{layer:02d}.safetensors"


# ---- models


def load_replaced(content: Mapping[str, Any], path: Path, chat: Chat) -> PreTrainedModel:
    """The dense model with mixtures where its networks stood, in float32 and eval mode.

    Layers that a sequential run has not come to keep their networks.

    Args:
        content: Of a layer-wise checkpoint.
        path: Where it lies.
        chat: The run's, for rows of new markers.

    Raises:
        ValueError: If the dense model or a finished layer is out of reach.
    """
    facts = content["layerwise"]
    state = content["state_dict"]
    if facts["mode"] == "sequential":
        state = gather_layers(state, facts["layer"], path.parent.parent / "layers")
    model = ModelConfig(facts["source"]).load("the checkpoint's dense model", chat, torch.float32)
    key = f"the checkpoint's dense model, {facts['source']}"
    ffns = prove(model, find_ffns(model, key), key)
    rule = RoutingRule(**facts["rule"])
    blocks = {}
    for ffn in ffns:
        prefix = f"{PREFIX}{ffn.layer}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if own:
            moe = new_moe(ffn, own["_widths"].tolist(), rule)
            moe.load_state_dict(own)
            blocks[ffn.name] = Replacement(moe)
    put_in_place(model, blocks, ffns)
    if rule.kind == "expert_choice":
        rank_zero_warn(
            "The experts of this model choose their tokens: written token by token, a text is answered by another "
            "function than was trained."
        )
    return model.eval()


def is_replaced(model: PreTrainedModel) -> bool:
    """Whether a model comes from `load_replaced`."""
    return any(isinstance(module, Replacement) for module in model.modules())


@torch.no_grad()
def stock_model(model: PreTrainedModel, key: str) -> PreTrainedModel:
    """The same function as a stock mixture of experts: experts padded with zeros to the widest one of all layers.

    Args:
        model: From `load_replaced`.
        key: The option that named the checkpoint, for messages.

    Raises:
        ValueError: If no stock model can hold it.
    """
    moes = {name: block.moe for name, block in model.named_modules() if isinstance(block, Replacement)}
    rule = next(iter(moes.values())).rule
    config = model.config
    if rule.kind == "expert_choice":
        raise ValueError(
            f"{key}: the experts choose their tokens, and no stock model has that: train with routing: token_choice, "
            "or use the checkpoint through this package (generate --model CHECKPOINT)."
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{key}: a {config.model_type} has no stock mixture of experts (one of {', '.join(FAMILIES)} has): use the "
            "checkpoint through this package (generate --model CHECKPOINT)."
        )
    if len(moes) < config.num_hidden_layers:
        raise ValueError(
            f"{key}: {len(moes)} of {config.num_hidden_layers} layers are trained: let the sequential run come to its "
            "end with fit."
        )
    experts = next(iter(moes.values())).num_experts
    stock_config = moe_config(config, UpcycleSpec(num_experts=experts, num_experts_per_tok=rule.top_k))
    widest = max(width for moe in moes.values() for width in moe.widths)
    widest = -(-widest // ALIGNED) * ALIGNED
    setattr(stock_config, FAMILIES[config.model_type].width, widest)
    with no_init_weights():
        stock = AutoModelForCausalLM.from_config(stock_config, dtype=torch.float32)
    stock.tie_weights()  # no_init_weights leaves a tied head untied
    own = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if ".mlp." not in name:
            parameter.copy_(own[name])
    for name, moe in moes.items():
        _fill_block(stock.get_submodule(name), moe, widest)
    stock.generation_config = model.generation_config
    return stock.eval()


def _fill_block(block: Any, moe: MoE, widest: int) -> None:
    """A stock block, [E, 2F, D] with gate above up, [E, D, F] and [E, D], from a mixture."""
    assert moe.gate_SD is not None, "the families that have a stock mixture have a gate"
    block.gate.weight.copy_(moe.router_ED / moe.temperature)
    gate_up_EFD, down_EDF = block.experts.gate_up_proj.zero_(), block.experts.down_proj.zero_()
    for e, (rows, width) in enumerate(zip(moe.spans(), moe.widths, strict=True)):
        gate_up_EFD[e, :width] = moe.gate_SD[rows]
        gate_up_EFD[e, widest : widest + width] = moe.up_SD[rows]
        down_EDF[e, :, :width] = moe.down_SD[rows].T
