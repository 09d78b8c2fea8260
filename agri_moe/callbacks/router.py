"""Router entropy and expert load: scalars per layer, and a heat map of layer by expert.

Shapes: L layers, G groups of rows, E experts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from agri_moe.callbacks.figures import last_step, log_figure, log_text, run_folder
from agri_moe.metrics import GroupRouting, RoutingStatistics

Array = np.ndarray[Any, Any]
_SAVED = {"load": "load_by_group"}


class RouterMonitor(lightning.Callback):
    """Log how the routers spread the tokens, padding left out.

    Per layer: `router_entropy/layer_NN` (mean entropy of the router's distribution over log E; 1 is undecided) and
    `expert_balance/layer_NN` (entropy of the experts' load over log E; 1 is a perfect balance, 0 one expert for all).
    At every validation: a heat map of each expert's share of the assignments, and `routing/step=NNNNNNNN.npz` in the
    run's folder (`load` [layers, experts], shares; `normalized_entropy` and `balance` [layers]; `step`).

    With `data.group_by` also which experts serve which group of the validation rows: a heat map for each layer
    (`expert_load_by_group`), and in the file `groups` (names), `group_by`, `load_by_group` [layers, groups, experts]
    (shares of each group's assignments), `mutual_information` [layers] (of group and expert, nats), and of each group
    `ce` and `tokens`.

    Args:
        every_n_steps: Optimizer steps between two entries; each entry covers the tokens of its own step.
    """

    def __init__(self, every_n_steps: int = 50):
        if every_n_steps < 1:
            raise ValueError(f"RouterMonitor.every_n_steps must be at least 1, not {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._statistics: RoutingStatistics | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember where training starts, to know when a step is done."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Gather the routing of the step's micro-batches; log when the step is done and due."""
        routed = outputs["routing"]
        if routed is None:
            return
        if self._statistics is None:
            self._statistics = RoutingStatistics(*routed.load_LE.shape).to(pl_module.device)
        self._statistics.update(routed)
        if trainer.global_step == self._seen_step:
            return  # still accumulating
        self._seen_step = trainer.global_step
        values = self._statistics.compute() if trainer.global_step % self.every_n_steps == 0 else {}
        if values:
            for prefix, key in (("router_entropy", "normalized_entropy"), ("expert_balance", "balance")):
                scalars = {f"{prefix}/layer_{i:02d}": v for i, v in enumerate(values[key].tolist())}
                for logger in trainer.loggers:
                    logger.log_metrics(scalars, step=last_step(trainer))
        self._statistics.reset()

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the load of every layer and expert over the validation rows, and write it down."""
        routing = getattr(pl_module, "val_routing", None)  # a dense model has none
        stats = routing.compute() if isinstance(routing, RoutingStatistics) else {}
        folder = run_folder(trainer) / "routing"
        by_group = _by_group(trainer, pl_module)
        if stats and not trainer.sanity_checking:
            log_figure(trainer, "expert_load", draw_load(stats["load"]))
            if by_group:
                names = by_group["groups"].tolist()
                log_figure(trainer, "expert_load_by_group", draw_groups(by_group["load_by_group"], names))
                log_text(trainer, "groups", "\n".join(f"{i}. {name}" for i, name in enumerate(names)))
            arrays = {name: stats[name].cpu().numpy() for name in ("load", "normalized_entropy", "balance")}
            _save(folder, arrays | by_group, trainer.global_step)


def _by_group(trainer: lightning.Trainer, module: lightning.LightningModule) -> dict[str, Array]:
    """What is known of groups of rows, as it is saved; nothing where none are told apart."""
    metric = getattr(module, "val_groups", None)
    stats = metric.compute() if isinstance(metric, GroupRouting) else {}
    if not isinstance(metric, GroupRouting) or not stats:
        return {}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    names = {"groups": np.array(metric.names), "group_by": np.array(data.group_by)}
    return names | {_SAVED.get(name, name): value.cpu().numpy() for name, value in stats.items()}


@rank_zero_only
def _save(folder: Path, arrays: dict[str, Array], step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"step={step:08d}.npz", allow_pickle=False, step=step, **arrays)


def draw_load(load_LE: Tensor) -> Figure:
    """Heat map of each expert's share of its layer's assignments; twice the even share is full colour."""
    share = load_LE.float().cpu().numpy()
    layers, experts = share.shape
    figure = Figure(figsize=(2 + 0.5 * experts, 1.5 + 0.25 * layers), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="viridis", vmin=0, vmax=2 / experts, aspect="auto")
    axes.set(xlabel="expert", ylabel="layer", title=f"share of assignments (even: {1 / experts:.3f})")
    axes.set(xticks=range(experts), yticks=range(layers))
    figure.colorbar(image, ax=axes, extend="max")
    return figure


def draw_groups(load_LGE: Array, names: Sequence[str]) -> Figure:
    """A heat map for each layer of the share of each group's assignments that each expert gets.

    Groups stand there by their numbers where a name is not plain: matplotlib does not shape Devanagari.
    """
    layers, groups, experts = load_LGE.shape
    columns = min(layers, 4)
    rows = -(-layers // columns)
    size = (columns * min(1.6 + 0.3 * experts, 6.0), rows * min(1.2 + 0.25 * groups, 6.0))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[layers:]:
        unused.set_axis_off()
    labels = [name if name.isascii() else str(number) for number, name in enumerate(names)]
    for layer, (axes, load_GE) in enumerate(zip(panels, load_LGE, strict=False)):
        image = axes.imshow(load_GE, cmap="viridis", vmin=0, vmax=2 / experts, aspect="auto")
        axes.set(xlabel="expert", title=f"layer {layer}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(groups), labels)
    figure.colorbar(image, ax=panels, extend="max", label=f"share of the group's assignments (even: {1 / experts:.3f})")
    return figure
