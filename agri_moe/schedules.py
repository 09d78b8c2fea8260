"""Values that change during training: by step, by the teacher's entropy, by the running loss of each layer.

Shapes: P compared layer pairs.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

LayerWeights = Literal["equal", "progressive", "balanced"]


class Moment(NamedTuple):
    """Where training stands, for whatever depends on it."""

    step: int = 0  # optimizer step, counted from the first one of the stage
    progress: float = 0.0  # share of the stage's steps that are done, in [0, 1]
    replicas: int = 1  # ranks times accumulated micro-batches: what the framework divides the gradient by


@dataclass
class Schedule:
    """A value that moves from `start` to `end` over `steps` optimizer steps, after `delay` steps at `start`.

    Args:
        start: Value at the beginning.
        end: Value from step `delay + steps` on.
        steps: Length of the transition in optimizer steps.
        kind: `linear`, `cosine` (half a period, flat at both ends), or `constant` (a jump from start to end).
        delay: Optimizer steps at `start` before the transition begins.
    """

    start: float
    end: float
    steps: int
    kind: Literal["constant", "linear", "cosine"] = "linear"
    delay: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.delay < 0:
            raise ValueError(f"a schedule needs steps >= 1 and delay >= 0, not steps={self.steps}, delay={self.delay}.")

    def at(self, step: int) -> float:
        """Value at optimizer step `step`, counted from 0."""
        progress = min(max(step - self.delay, 0) / self.steps, 1.0)
        if self.kind == "constant":
            progress = float(progress == 1.0)
        elif self.kind == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


Value = float | Schedule


@dataclass
class AdaptiveTemperature:
    """A temperature that follows the teacher: high where it is certain and one class hides all others, low where not.

        T = minimum + (maximum - minimum) exp(-H / scale)

    with H the running mean over optimizer steps of the teacher's entropy in nats, at temperature 1, over the tokens
    that carry KL. The aim, soft labels that stay equally informative, is that of Luong et al. 2026 (CIST,
    arXiv:2605.20357), who set a temperature for each sample from its largest logit; this rule is our own, with one
    temperature for all tokens, since the T^2 before the divergence would else weigh tokens unequally. Before the first
    entropy is known T is `minimum`.

    Args:
        minimum: Temperature under a teacher that knows nothing.
        maximum: Temperature under a teacher that is certain.
        scale: Entropy in nats at which 1 / e of the way is left.
        decay: Weight of the past in the running mean, per optimizer step.
    """

    minimum: float = 1.0
    maximum: float = 2.0
    scale: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.maximum:
            raise ValueError(
                f"an adaptive temperature needs 0 < minimum <= maximum, not {self.minimum} and {self.maximum}."
            )
        if self.scale <= 0 or not 0 <= self.decay < 1:
            raise ValueError(
                f"an adaptive temperature needs scale > 0 and decay in [0, 1), not {self.scale} and {self.decay}."
            )

    def at(self, entropy: "RunningMean") -> Tensor:
        """Temperature as a 0-d tensor on the device of the running entropy."""
        high = (self.maximum - self.minimum) * torch.exp(-entropy.value / self.scale)
        return self.minimum + high * (entropy.weight > 0)


Temperature = float | Schedule | AdaptiveTemperature


def value_at(value: Value, step: int) -> float:
    """A number, or a schedule's value at this optimizer step."""
    return value.at(step) if isinstance(value, Schedule) else float(value)


def bounds(value: Temperature) -> tuple[float, float]:
    """Smallest and largest value that is taken."""
    if isinstance(value, Schedule):
        return min(value.start, value.end), max(value.start, value.end)
    if isinstance(value, AdaptiveTemperature):
        return value.minimum, value.maximum
    return float(value), float(value)


def is_on(value: Value) -> bool:
    """Whether a weight is ever above 0."""
    return bounds(value)[1] > 0


class RunningMean(nn.Module):
    """Exponentially weighted mean of a vector over optimizer steps, without bias towards its start.

    The correction is Adam's (Kingma & Ba 2015, section 3). It is a module so that checkpoints hold it.

    Args:
        shape: Shape of the vector; () for a number.
        decay: Weight of the past, per update.
    """

    def __init__(self, *shape: int, decay: float = 0.9):
        super().__init__()
        self.decay = decay
        self.total: Tensor
        self.weight: Tensor
        # Not in the default type, which Lightning's bf16-true sets while it builds.
        self.register_buffer("total", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> "RunningMean":
        # `module.to(torch.bfloat16)`, Lightning's bf16-true, would round the sums.
        return super()._apply(lambda t: t.to(fn(t).device), recurse)

    @property
    def value(self) -> Tensor:
        """The mean; zeros before the first update."""
        return self.total / self.weight.where(self.weight > 0, 1.0)

    def reset(self) -> None:
        """Forget everything."""
        self.total.zero_()
        self.weight.zero_()

    def update(self, values: Tensor, seen: Tensor) -> None:
        """Take in one step's values; `seen` [] bool: False leaves everything as it is, without asking the device."""
        keep = self.decay + (1 - self.decay) * (~seen).float()
        self.total.mul_(keep).add_((1 - keep) * values.where(seen, 0.0))
        self.weight.mul_(keep).add_(1 - keep)


def layer_weights(
    kind: LayerWeights,
    pairs: int,
    progress: float,
    running: RunningMean | None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Weights g of the compared layer pairs, first layer first, [P] with mean 1, made on the device.

    - `equal`: 1 each.
    - `progressive`: g_l proportional to (1 - p) (1 - d_l) + p d_l, with p the progress of training and
      d_l = (l + 1/2) / P the depth: early training shapes the first layers, the end of training the last, as in the
      progressive internal distillation of Aguilar et al. 2020 (arXiv:1910.03723), here without jumps.
    - `balanced`: g_l proportional to 1 / R_l, with R_l the running loss of the pair, so that each contributes alike.
      It is the optimum of the uncertainty weighting of Kendall, Gal & Cipolla 2018 (arXiv:1705.07115), whose
      L_l / s^2 + log s^2 is smallest at s^2 = L_l. R_l counts as a hundredth of the layers' mean at least, so that a
      pair that agrees already does not take all the weight. Equal before the first loss is known.
    """
    if kind == "progressive":
        depth = (torch.arange(pairs, dtype=torch.float32, device=device) + 0.5) / pairs
        weight = (1 - progress) * (1 - depth) + progress * depth
    elif kind == "balanced":
        assert running is not None, "a balanced term keeps its running losses"
        losses = running.value.clamp(min=0)  # 1 - debiased CKA may fall below 0
        floor = (losses.mean() / 100).clamp(min=1e-12)  # all at 0 weigh alike, and no sum of weights overflows
        weight = torch.where(running.weight > 0, 1 / torch.maximum(losses, floor), 1.0)
    else:
        weight = torch.ones(pairs, dtype=torch.float32, device=device)
    return weight / weight.mean()
