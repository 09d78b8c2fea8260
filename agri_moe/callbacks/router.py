"""Router entropy and expert load: scalars per layer, and a heat map of layer by expert.

Shapes: L layers, E experts.
"""

from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from torch import Tensor

from agri_moe.callbacks.figures import last_step, log_figure, run_folder
from agri_moe.metrics import RoutingStatistics


class RouterMonitor(lightning.Callback):
    """Log how the routers spread the tokens, padding left out.

    Per layer: `router_entropy/layer_NN` (mean entropy of the router's distribution over log E; 1 is undecided) and
    `expert_balance/layer_NN` (entropy of the experts' load over log E; 1 is a perfect balance, 0 one expert for all).
    At every validation: a heat map of each expert's share of the assignments, and `routing/step=NNNNNNNN.npz` in the
    run's folder (`load` [layers, experts], shares; `normalized_entropy` and `balance` [layers]; `step`).

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
        if stats and not trainer.sanity_checking:
            log_figure(trainer, "expert_load", draw_load(stats["load"]))
            _save(folder, stats, trainer.global_step)


@rank_zero_only
def _save(folder: Path, stats: dict[str, Tensor], step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    load, entropy, balance = (stats[name].cpu().numpy() for name in ("load", "normalized_entropy", "balance"))
    np.savez(folder / f"step={step:08d}.npz", load=load, normalized_entropy=entropy, balance=balance, step=step)


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
