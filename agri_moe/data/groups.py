"""Groups of rows, such as crops or languages, by a column: validation then tells them apart.

A batch carries nothing more for it: it names its rows already, and which group a row belongs to is looked up.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from agri_moe.data.sources import check_columns, find_sources, of_each

GROUPS_AT_MOST = 64
"""Each is a curve in the logs and a row in a picture."""


@dataclass(frozen=True)
class Groups:
    """Which row belongs to which group.

    Args:
        names: Of the groups, in the order of their letters.
        of_row: [rows] number of each row's group.
    """

    names: tuple[str, ...]
    of_row: np.ndarray[Any, Any]

    @classmethod
    def of(cls, names: list[str]) -> Groups:
        """From the name of each row's group."""
        found, of_row = np.unique(np.array(names, dtype=object), return_inverse=True)
        return cls(tuple(found.tolist()), of_row)

    def select(self, chosen: np.ndarray[Any, Any]) -> Groups:
        """Those of the rows at these positions; a group of which none is left is gone."""
        used, of_row = np.unique(self.of_row[chosen], return_inverse=True)
        return Groups(tuple(self.names[i] for i in used.tolist()), of_row)

    def check(self, group_by: str) -> None:
        """Raises a ValueError if there are too many to look at."""
        if len(self.names) > GROUPS_AT_MOST:
            raise ValueError(
                f"data.group_by {group_by} has {len(self.names):,} values in the validation rows, more than the "
                f"{GROUPS_AT_MOST} that can be told apart: name a column with fewer."
            )


def group_of(values: Mapping[str, Any], column: str) -> str | None:
    """The group of a row with these values: its value of a column, or struct.field; None if it has none.

    Space is made single, so that a name stays on its line.
    """
    value: Any = values
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, Mapping | list):
        return None
    return " ".join(str(value).split()) or None


def missing_group(column: str) -> str:
    """The reason against a row without a group."""
    return f"{column} is missing or empty, by which data.group_by sorts the rows"


def grouped(data: Any, split: str) -> bool:
    """Whether the sources of a split of a data module hold rows that validation or test sorts into groups."""
    if data.group_by is None:
        return False
    return split != "train" or (data.validation is None and data.validation_share > 0)


def check_group_by(data: Any) -> None:
    """Raises a ValueError if the sources of a data module lack the column that its `group_by` names."""
    if data.group_by is None:
        return
    splits = [name for name in ("train", "validation", "test") if getattr(data, name, None) is not None]
    if not any(grouped(data, split) for split in splits):
        raise ValueError(
            "data.group_by sorts validation rows, and there are none: set data.validation or data.validation_share, or "
            "leave it out."
        )
    ask = functools.partial(
        check_columns, wanted={"group": data.group_by.split(".")[0]}, remedy="data.group_by: COLUMN or STRUCT.FIELD"
    )
    for split in splits:
        if grouped(data, split):
            of_each(find_sources(getattr(data, split), f"data.{split}"), ask)
