"""Which layers of the student are compared with which of the teacher."""

from collections.abc import Sequence
from typing import Literal

Pairs = list[tuple[int, int]]
LayerMap = Literal["uniform", "last", "progressive"] | list[tuple[int, int]]


def layer_pairs(layers: LayerMap, student_layers: int, teacher_layers: int, key: str, *, attention: bool) -> Pairs:
    """Pairs (student layer, teacher layer), counted from 0, in the order of the student's layers.

    - `uniform`: every student layer i with the teacher's at the same relative depth, round((i + 1) L_t / L_s) - 1.
    - `last`: the last of both only.
    - `progressive`: of the uniform pairs, all in the first third of the student, every second in the middle third;
      the last third is left to attention matching (and is all that attention matching gets). Early layers are close
      to the input and easily kept; the last ones serve the student's own output and are held by their attention only,
      as MiniLM does (Wang et al. 2020, arXiv:2002.10957).
    - A list of pairs is taken as it stands.

    Args:
        layers: The setting.
        student_layers: L_s.
        teacher_layers: L_t.
        key: Name of the setting, for messages.
        attention: Whether the pairs serve attention matching; only `progressive` asks.

    Raises:
        ValueError: A pair outside the two models, a pair named twice, or none at all.
    """
    if not isinstance(layers, str):
        return _explicit(layers, student_layers, teacher_layers, key)
    uniform = [(i, max(round((i + 1) * teacher_layers / student_layers) - 1, 0)) for i in range(student_layers)]
    if layers == "uniform":
        return uniform
    if layers == "last":
        return uniform[-1:]
    third = student_layers / 3
    early = [pair for pair in uniform if pair[0] < third]
    middle = [pair for pair in uniform if third <= pair[0] < 2 * third][::2]
    last = [pair for pair in uniform if pair[0] >= 2 * third]
    return (last or uniform[-1:]) if attention else early + middle


def _explicit(pairs: Sequence[tuple[int, int]], student_layers: int, teacher_layers: int, key: str) -> Pairs:
    if not pairs:
        raise ValueError(f"{key} is empty: name pairs such as [[0, 1], [3, 7]], or uniform.")
    for student, teacher in pairs:
        if not (0 <= student < student_layers and 0 <= teacher < teacher_layers):
            raise ValueError(
                f"{key}: [{student}, {teacher}] is no pair of layers; the student has 0 to {student_layers - 1}, "
                f"the other model 0 to {teacher_layers - 1}."
            )
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{key} names a pair of layers twice: name each once.")
    return sorted(pairs)
