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
from typing import Any

from lightning import Trainer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agri_moe.models.ffn import FFN
from agri_moe.models.moe import MoE, RoutingRule

PREFIX = "layers."
"""Where the mixtures stand in a checkpoint's state."""


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

    def __init__(self, trainer: Trainer):
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
