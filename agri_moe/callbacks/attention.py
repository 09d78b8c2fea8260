"""Attention of the advisory to the thought, per layer, before and after training: pictures, a number and an `.npz`.

Shapes: B batch, T sequence, Q queries of a sequence, G key-value groups, L layers, K tokens of one row.
"""

from collections.abc import Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from transformers import AutoModelForCausalLM

from agri_moe.callbacks.figures import log_figure, run_folder
from agri_moe.data.chat import Segment
from agri_moe.data.chat_data import ChatDataModule
from agri_moe.losses import attention_mass
from agri_moe.models.attention import capture_attention, check_readable, unreadable
from agri_moe.models.base import LanguageModule
from agri_moe.models.causal import CausalModel
from agri_moe.models.distill import DistillModule
from agri_moe.teacher import OnlineTeacher

MAP_QUERIES = 32  # lines of the heat map at most


class RowAttention(NamedTuple):
    """Where the advisory of one row looks."""

    attention_QK: np.ndarray[Any, Any]  # last layer, mean over groups
    queries_Q: np.ndarray[Any, Any]  # the querying tokens' places in the row
    segment_ids_K: np.ndarray[Any, Any]


class AttentionMonitor(lightning.Callback):
    """Measure how much of the attention of the positions that write the advisory falls on the thought's tokens.

    Taken on the first validation batches, before the first training step and at every validation. Logs the mean over
    layers as `val/attention_to_thought`, the figures `attention_to_thought` (per layer, before and now, and the
    teacher's where it reads the student's tokens) and `attention_map` (one row in the last layer), and writes
    `attention/step=NNNNNNNN.npz` into the run's folder (`share` [layers], `step`).

    Args:
        batches: Validation micro-batches that are looked at, on each rank.
        queries: Advisory positions of each sequence, evenly spread; rows without a thought have none.
    """

    def __init__(self, batches: int = 2, queries: int = 16):
        if batches < 1 or queries < 1:
            raise ValueError(f"AttentionMonitor needs batches >= 1 and queries >= 1, not {batches} and {queries}.")
        self.batches = batches
        self.queries = queries
        self.before: list[float] | None = None  # the student's share per layer at step 0
        self._student: list[Tensor] = []  # [L + 1] of each batch: sums of shares, and the number of queries
        self._teacher: list[Tensor] = []
        self._row: RowAttention | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse rows that have no thoughts, and a model whose attention cannot be read, before weights are loaded."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, LanguageModule) or not isinstance(data, ChatDataModule):
            raise ValueError(
                "AttentionMonitor needs thoughts and advisories, which only ChatDataModule has; "
                "take it out of trainer.callbacks."
            )
        config = pl_module.model_config.hf_config(pl_module.model_key, data.chat)
        with torch.device("meta"):
            check_readable(AutoModelForCausalLM.from_config(config), "AttentionMonitor in trainer.callbacks")

    def state_dict(self) -> dict[str, Any]:
        """A resumed run still knows where it began."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        self.before = state_dict["before"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measure the student as it is before its first step."""
        if trainer.global_step > 0:
            return
        assert isinstance(pl_module, LanguageModule)
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        limit = trainer.limit_val_batches
        batches = limit if isinstance(limit, int) else int(len(loader) * limit)
        training = pl_module.training
        pl_module.eval()
        for batch in islice(loader, min(self.batches, batches)):
            self._look(trainer, pl_module, trainer.strategy.batch_to_device(batch))
        pl_module.train(training)
        share_L = _mean_share(trainer, self._student)
        self._forget()
        if share_L is not None:
            self.before = share_L.tolist()
            _save(run_folder(trainer) / "attention", share_L, 0)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the first batches."""
        if batch_idx < self.batches and not trainer.sanity_checking:
            assert isinstance(pl_module, LanguageModule)
            self._look(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log number and figures, and write the shares down."""
        if trainer.sanity_checking:
            return
        share_L, teacher_L = (_mean_share(trainer, measured) for measured in (self._student, self._teacher))
        row = self._row
        self._forget()
        if share_L is None:
            rank_zero_warn("AttentionMonitor: no row of the first validation batches has a thought; nothing to show.")
            return
        pl_module.log("val/attention_to_thought", float(share_L.mean()))
        log_figure(trainer, "attention_to_thought", draw_shares(share_L, self.before, teacher_L))
        if row is not None:
            log_figure(trainer, "attention_map", draw_row(row))
        _save(run_folder(trainer) / "attention", share_L, trainer.global_step)

    def _look(self, trainer: lightning.Trainer, module: LanguageModule, batch: dict[str, Tensor]) -> None:
        """Add one batch: the student's shares, the teacher's if it reads the same tokens, and the row to be drawn."""
        on_cpu = {name: batch[name].cpu() for name in ("segment_ids", "target_segments", "row_ids", "position_ids")}
        queries_BQ = advisory_queries(on_cpu, self.queries)
        shown = None if self._student else _row_to_show(on_cpu, queries_BQ)
        asked_BQ = queries_BQ if shown is None else _with_row(queries_BQ, shown, on_cpu)
        with trainer.precision_plugin.val_step_context():
            attention = attention_of(module.model, batch, asked_BQ)
        self._student.append(_shares(attention, batch, self.queries))
        if shown is not None:
            b, row = shown
            attention_QT = attention[-1][b, :, self.queries :].mean(0).cpu()
            self._row = _cut_out(attention_QT, asked_BQ[b, self.queries :], row, on_cpu["segment_ids"][b])
        if isinstance(module, DistillModule) and module.uses_teacher and "teacher_input_ids" not in batch:
            teacher = module.teacher
            if isinstance(teacher, OnlineTeacher) and unreadable(teacher.model.hf) is None:
                self._teacher.append(_shares(attention_of(teacher.model, batch, queries_BQ), batch, self.queries))

    def _forget(self) -> None:
        self._student, self._teacher, self._row = [], [], None


@torch.no_grad()
def attention_of(model: CausalModel, batch: dict[str, Tensor], queries_BQ: Tensor) -> list[Tensor]:
    """Attention of the queries in every layer, one [B, G, Q, T] each."""
    batch = batch | {"queries": queries_BQ.to(batch["input_ids"].device)}
    with capture_attention(model.hf.model.layers, batch) as attention:
        # Through the model's own forward, without any position at its end: only there are shards whole.
        model(batch, batch["input_ids"].new_zeros(0), lambda hidden, head: None)
    return attention


def advisory_queries(batch: Mapping[str, Tensor], most: int) -> Tensor:
    """[B, most] int64 places in each sequence that write the advisory of a row with a thought, evenly spread.

    -1 where there are fewer. The place that writes a token is the one before it.
    """
    queries_BQ = torch.full((len(batch["row_ids"]), most), -1)
    for b, rows_T in enumerate(batch["row_ids"]):
        with_thought = rows_T[batch["segment_ids"][b] == Segment.THOUGHT].unique()
        advisory_T = (batch["target_segments"][b] == Segment.ASSISTANT) & torch.isin(rows_T, with_thought)
        chosen = _evenly(advisory_T.nonzero()[:, 0], most)
        queries_BQ[b, : len(chosen)] = chosen
    return queries_BQ


def _evenly(places: Tensor, most: int) -> Tensor:
    count = min(most, len(places))
    return places[torch.arange(count) * len(places) // max(count, 1)]


def _row_to_show(batch: Mapping[str, Tensor], queries_BQ: Tensor) -> tuple[int, slice] | None:
    """Sequence and place in it of the first row that has a query; None if there is none."""
    with_queries = (queries_BQ >= 0).any(1).nonzero()
    if not len(with_queries):
        return None
    b = int(with_queries[0])
    t = int(queries_BQ[b, 0])
    start = t - int(batch["position_ids"][b, t])
    length = int((batch["row_ids"][b] == batch["row_ids"][b, t]).sum())
    return b, slice(start, start + length)


def _with_row(queries_BQ: Tensor, shown: tuple[int, slice], batch: Mapping[str, Tensor]) -> Tensor:
    """The queries with the shown row's own behind them, so that one forward pass answers both."""
    b, row = shown
    more = torch.full((len(queries_BQ), MAP_QUERIES), -1)
    advisory = (batch["target_segments"][b, row] == Segment.ASSISTANT).nonzero()[:, 0] + row.start
    chosen = _evenly(advisory, MAP_QUERIES)
    more[b, : len(chosen)] = chosen
    return torch.cat([queries_BQ, more], 1)


def _cut_out(attention_QT: Tensor, queries_Q: Tensor, row: slice, segment_ids_T: Tensor) -> RowAttention:
    asked = queries_Q >= 0
    return RowAttention(
        attention_QT[asked][:, row].float().numpy(),
        (queries_Q[asked] - row.start).numpy(),
        segment_ids_T[row].numpy(),
    )


def _shares(attention: list[Tensor], batch: Mapping[str, Tensor], queries: int) -> Tensor:
    """[L + 1]: sum over queries of the share on the thought in each layer, and the number of queries."""
    pairs = [attention_mass(a_BGQT[:, :, :queries], batch["segment_ids"], Segment.THOUGHT) for a_BGQT in attention]
    return torch.stack([*(total for total, _ in pairs), pairs[0][1]])


def _mean_share(trainer: lightning.Trainer, measured: list[Tensor]) -> np.ndarray[Any, Any] | None:
    """[L] mean share over the batches of all ranks; None if no query was asked."""
    if not measured:
        return None
    sums: Tensor = trainer.strategy.reduce(torch.stack(measured).sum(0), reduce_op="sum")
    sums = sums.cpu()
    return (sums[:-1] / sums[-1]).numpy() if sums[-1] > 0 else None


@rank_zero_only
def _save(folder: Path, share_L: np.ndarray[Any, Any], step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / f"step={step:08d}.npz", share=share_L, step=step)


def draw_shares(
    now_L: np.ndarray[Any, Any], before: list[float] | None, teacher_L: np.ndarray[Any, Any] | None
) -> Figure:
    """Share of the advisory's attention on the thought, layer by layer; the teacher's at the same relative depth."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    layers = np.arange(len(now_L))
    if teacher_L is not None:
        depth = (np.arange(len(teacher_L)) + 1) * len(now_L) / len(teacher_L) - 1
        axes.plot(depth, teacher_L, "--", color="black", label="teacher, same relative depth")
    if before is not None:
        axes.plot(layers, before, "o-", color="0.6", label="student before training")
    axes.plot(layers, now_L, "o-", color="tab:green", label="student now")
    axes.set(xlabel="student layer", ylabel="share of attention", title="attention from advisory to thought")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def draw_row(row: RowAttention) -> Figure:
    """Heat map of one row, advisory positions by the row's tokens; lines and names mark the segments."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    seen = row.attention_QK[row.attention_QK > 0]
    # The first token draws most of many heads' attention: full colour for the top hundredth, or nothing else shows.
    top = float(np.quantile(seen, 0.99))
    image = axes.imshow(row.attention_QK, cmap="magma", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    borders = [0, *(np.flatnonzero(np.diff(row.segment_ids_K)) + 1).tolist(), len(row.segment_ids_K)]
    for border in borders[1:-1]:
        axes.axvline(border - 0.5, color="white", linewidth=0.8)
    names = [Segment(int(row.segment_ids_K[start])).name.lower() for start in borders[:-1]]
    axes.set_xticks([(a + b - 1) / 2 for a, b in pairwise(borders)], names)
    lines = np.arange(0, len(row.queries_Q), max(len(row.queries_Q) // 8, 1))
    axes.set_yticks(lines, [str(place) for place in row.queries_Q[lines]])
    axes.set(xlabel="token of the row", ylabel="advisory position", title="attention in the last layer")
    figure.colorbar(image, ax=axes, extend="max")
    return figure
