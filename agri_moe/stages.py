"""One run in several stages: each is as if a new run had begun from the weights that the one before it left.

`Stage` is what a config says; `StageSettings` is what holds in a stage once the module's own settings have filled the
gaps; a span, `range(first, last + 1)`, says which optimizer steps it has.
"""

import copy
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from agri_moe.objective import Objective

D = TypeVar("D")


@dataclass
class Stage:
    """One stage of a run; what is None stays as the module has it.

    Args:
        steps: Optimizer steps that it lasts. The last stage may leave steps and epochs out: it lasts to the end.
        epochs: The same in passes over the rows; may be a fraction.
        freeze: Regular expressions of parameters that do not learn, instead of the module's.
        train: Regular expressions of the only parameters that learn, instead of any `freeze`.
        learning_rate: Peak learning rate, reached after a warm-up of its own.
        learning_rate_multipliers: Regular expression -> factor on the learning rate, instead of the module's.
        warmup_steps: Optimizer steps from 0 to the full learning rate.
        objective: Keys of the objective that differ, nested as they are there, such as {kl: {weight: 0.0}}. Schedules
            count from the stage's first step.
    """

    steps: int | None = None
    epochs: float | None = None
    freeze: list[str] | None = None
    train: list[str] | None = None
    learning_rate: float | None = None
    learning_rate_multipliers: dict[str, float] | None = None
    warmup_steps: int | None = None
    objective: dict[str, Any] | None = None


class Rule(NamedTuple):
    """A regular expression on parameter names, and where the config has it."""

    key: str
    pattern: str
    scale: float

    def matches(self, name: str) -> bool:
        """Whether it is about this parameter."""
        return re.search(self.pattern, name) is not None


@dataclass(frozen=True)
class StageSettings:
    """What holds in a stage, with nothing left open.

    Args:
        key: Where the config has it.
        objective: Terms and weights of the loss.
        learning_rate: Peak learning rate.
        warmup_steps: Optimizer steps from 0 to it.
        rules: Factors on the learning rate; the first that matches a name counts.
        only: If there are any, a name that none of them matches does not learn.
    """

    key: str
    objective: Objective
    learning_rate: float
    warmup_steps: int
    rules: tuple[Rule, ...]
    only: tuple[Rule, ...] = ()

    def scales(self, names: Sequence[str]) -> dict[str, float]:
        """Factor on the learning rate for each parameter name; 0 means frozen.

        Raises:
            ValueError: If a pattern matches no name or is no regular expression, or a factor is negative.
        """
        for rule in (*self.rules, *self.only):
            _check_rule(rule, names)
        return {name: self._scale(name) for name in names}

    def _scale(self, name: str) -> float:
        if self.only and not any(rule.matches(name) for rule in self.only):
            return 0.0
        return next((rule.scale for rule in self.rules if rule.matches(name)), 1.0)


def _check_rule(rule: Rule, names: Sequence[str]) -> None:
    try:
        found = any(rule.matches(name) for name in names)
    except re.error as error:
        raise ValueError(f"{rule.key}: {rule.pattern!r} is no regular expression ({error}).") from None
    if not found:
        raise ValueError(
            f"{rule.key}: {rule.pattern!r} matches no parameter; names look like {names[len(names) // 2]}."
        )
    if rule.scale < 0:
        raise ValueError(f"{rule.key}: the factor of {rule.pattern!r} must not be negative.")


# ---------------------------------------------------------------------- from the config


def settings(
    stages: Sequence[Stage] | None,
    *,
    objective: Objective,
    learning_rate: float,
    warmup_steps: int,
    freeze: Sequence[str],
    multipliers: Mapping[str, float],
) -> list[StageSettings]:
    """What holds in each stage; a run without stages is one stage with the module's settings.

    Raises:
        ValueError: If a stage's settings contradict each other or make no sense.
    """
    if stages is not None and not stages:
        raise ValueError("model.stages is empty; name at least one stage, or leave the key out.")
    found = []
    for index, stage in enumerate(stages or [Stage()]):
        key = f"model.stages[{index}]" if stages else "model"
        if stages:
            _check_stage(stage, key, last=index == len(stages) - 1)
        freeze_key = "model.freeze" if stage.freeze is None else f"{key}.freeze"
        scale_key = f"{key if stage.learning_rate_multipliers is not None else 'model'}.learning_rate_multipliers"
        frozen = stage.freeze if stage.freeze is not None else freeze if stage.train is None else []
        scaled = multipliers if stage.learning_rate_multipliers is None else stage.learning_rate_multipliers
        found.append(
            StageSettings(
                key,
                override(objective, stage.objective or {}, f"{key}.objective"),
                learning_rate if stage.learning_rate is None else stage.learning_rate,
                warmup_steps if stage.warmup_steps is None else stage.warmup_steps,
                rules=(
                    *(Rule(freeze_key, pattern, 0.0) for pattern in frozen),
                    *(Rule(scale_key, pattern, scale) for pattern, scale in scaled.items()),
                ),
                only=tuple(Rule(f"{key}.train", pattern, 1.0) for pattern in stage.train or []),
            )
        )
    return found


def _check_stage(stage: Stage, key: str, *, last: bool) -> None:
    if stage.steps is not None and stage.epochs is not None:
        raise ValueError(f"{key} has both steps and epochs; leave one out.")
    if stage.steps is None and stage.epochs is None and not last:
        raise ValueError(f"{key} has neither steps nor epochs, which only the last stage may leave out.")
    for name in ("steps", "epochs", "learning_rate"):
        if (value := getattr(stage, name)) is not None and value <= 0:
            raise ValueError(f"{key}.{name} must be positive, not {value}.")
    if stage.warmup_steps is not None and stage.warmup_steps < 0:
        raise ValueError(f"{key}.warmup_steps must not be negative, not {stage.warmup_steps}.")
    if stage.freeze is not None and stage.train is not None:
        raise ValueError(f"{key} has both freeze and train; leave one out.")
    if stage.train is not None and not stage.train:
        raise ValueError(f"{key}.train is empty; name what learns, or leave the key out.")


def override(current: D, changes: Mapping[str, Any], key: str) -> D:
    """A copy of a dataclass with some keys changed, nested ones too.

    Values are read by jsonargparse under the field's annotation, as the command line reads those of the whole
    objective. Where a value may be a number or a schedule, the whole value is replaced.

    Args:
        current: An instance of a dataclass.
        changes: Field name -> value; for a field that is itself a dataclass, the changes in it.
        key: Where the config has them.

    Raises:
        ValueError: If a key is unknown, a value does not fit, or the outcome makes no sense.
    """
    hints = get_type_hints(type(current))
    known = [field.name for field in fields(current) if field.init]  # type: ignore[arg-type]
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{key}.{name} is no key; known are {', '.join(known)}.")
        if is_dataclass(hints[name]) and not is_dataclass(value):
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}.{name} must be a mapping with keys of its own, not {value!r}.")
            values[name] = override(getattr(current, name), value, f"{key}.{name}")
        else:
            values[name] = _parsed(hints[name], value, f"{key}.{name}")
    try:
        return replace(current, **values)  # type: ignore[type-var]
    except ValueError as error:
        wrong = str(error)
    # Not inside the handler: what the user is shown is the innermost error, and that one does not name the stage.
    raise ValueError(f"{key} cannot be so: {wrong}")


def _parsed(hint: Any, value: Any, key: str) -> Any:
    if is_dataclass(hint):
        return value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.instantiate(parser.parse_object({"value": copy.deepcopy(value)})).value
    except (ArgumentError, ValueError, TypeError):
        pass  # raised below, outside the handler, for the reason given in `override`
    raise ValueError(f"{key} cannot be {value!r}; it takes {_described(hint)}.")


def _described(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_described(part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {_described(get_args(hint)[0])}"
    if is_dataclass(hint):
        names = ", ".join(field.name for field in fields(hint))
        return f"{getattr(hint, '__name__', hint)} {{{names}}}"
    return str(getattr(hint, "__name__", hint))


# ---------------------------------------------------------------------- when


def spans(stages: Sequence[Stage] | None, total: int, epoch_steps: Callable[[], int]) -> list[range]:
    """The optimizer steps of each stage, from 0 to `total`.

    Args:
        stages: From the config.
        total: Optimizer steps of the run.
        epoch_steps: Optimizer steps of one epoch; asked only where a stage counts in epochs.

    Raises:
        ValueError: If they do not fill the run exactly.
    """
    if not stages:
        return [range(total)]
    check_total(stages, total)
    stops, end = [0], 0.0
    for stage in stages:
        if stage.steps or stage.epochs:
            end += stage.steps or (stage.epochs or 0.0) * epoch_steps()
            stops.append(round(end))
    endless = len(stops) == len(stages)
    if stops[-1] > total or (endless and stops[-1] == total):
        raise ValueError(_too_long(stops[-1], total))
    if endless:
        stops.append(total)
    if stops[-1] < total:
        raise ValueError(
            f"model.stages: the stages last {stops[-1]} optimizer steps, the run {total}; "
            "leave steps and epochs of the last stage out, and it lasts to the end."
        )
    found = [range(start, stop) for start, stop in pairwise(stops)]
    if short := [index for index, span in enumerate(found) if not span]:
        raise ValueError(f"model.stages[{short[0]}].epochs is less than one optimizer step; make it longer.")
    return found


def check_total(stages: Sequence[Stage], total: int) -> None:
    """Refuse stages that need more optimizer steps than the run has, as far as it shows without the rows' number.

    Raises:
        ValueError: If they do.
    """
    needed = sum(stage.steps or 0 for stage in stages)
    if needed > total or (needed == total and any(stage.steps is None for stage in stages)):
        raise ValueError(_too_long(needed, total))


def _too_long(needed: int, total: int) -> str:
    rest = " and some for the last stage" if needed == total else ""
    return (
        f"model.stages: the stages need {needed} optimizer steps{rest}, the run has {total}; "
        "shorten them, or set trainer.max_steps or trainer.max_epochs higher."
    )


def stage_at(spans: Sequence[range], step: int) -> int:
    """Index of the stage that has this optimizer step; past the end, of the last one."""
    return next((index for index, span in enumerate(spans) if step in span), len(spans) - 1)


# ---------------------------------------------------------------------- what is told


def trained_summary(scales: Mapping[str, float], sizes: Mapping[str, int]) -> str:
    """How many parameters learn, in all and by kind: their names without the layer's number.

    Args:
        scales: Parameter name -> factor on its learning rate; 0 means frozen.
        sizes: Parameter name -> how many numbers it holds.
    """
    kinds: dict[str, tuple[int, int]] = {}
    for name, size in sizes.items():
        kind = re.sub(r"^model\.(layers\.\d+\.)?|\.(weight|bias)$", "", name)
        trained, total = kinds.get(kind, (0, 0))
        kinds[kind] = trained + size * (scales[name] > 0), total + size
    parts = [
        f"{kind} {trained:,}" + (f" of {total:,}" if trained < total else "")
        for kind, (trained, total) in kinds.items()
        if trained
    ]
    trained, total = (sum(numbers) for numbers in zip(*kinds.values(), strict=True))
    return f"trains {trained:,} of {total:,} parameters: {', '.join(parts)}"
