"""Tokens of a student that are merges of its teacher's pieces: where the teacher reads them, and what follows where.

    a token of the student       | की |मत|
    the teacher's pieces         | क|ी |म|त|

A token is matched where the teacher has exactly its pieces at the same bytes of the text. A boundary between tokens
that is none between the teacher's pieces matches nothing.

Shapes: M positions with KL, N merged tokens, G pieces that some of them begin with, K most pieces of a token, U the
teacher's tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from agri_moe.losses import Merged

Batch = dict[str, Tensor]


class MergedTokens:
    """What the objective wants to know of a student's merged tokens.

    Args:
        merged: Id of each -> the teacher's pieces, at least two; ids without a gap, above those of all pieces.
    """

    def __init__(self, merged: Mapping[int, Sequence[int]]) -> None:
        ids = sorted(merged)
        spelled = [tuple(merged[token]) for token in ids]
        assert ids == list(range(ids[0], ids[0] + len(ids))), "as `read_pieces` checks"
        self.width = ids[0]
        self.most = max(map(len, spelled))
        ordered = sorted(spelled)
        rank = [bisect.bisect_left(ordered, pieces) for pieces in spelled]
        firsts = sorted({pieces[0] for pieces in spelled})
        group = {first: g for g, first in enumerate(firsts)}
        # After a token come, in the order of their pieces, all those that begin with its own, and then no more.
        end = [bisect.bisect_right(ordered, pieces, key=lambda other: other[: len(pieces)]) for pieces in spelled]
        padded = [[*pieces, *[-1] * (self.most - len(pieces))] for pieces in spelled]
        self._fixed = {
            "merged_first": torch.tensor(firsts),
            "merged_group": torch.tensor([group[pieces[0]] for pieces in spelled]),
            "merged_rank": torch.tensor(rank),
        }
        self._spans_N2 = torch.tensor([rank, end]).T.contiguous()
        self._pieces_NK = torch.tensor(padded)

    def pieces(self, tokens_M: Tensor) -> Tensor:
        """The pieces of each token [M, K], filled up with -1; a token that is no merge is its own piece."""
        place_M = tokens_M - self.width
        own_MK = torch.full((len(tokens_M), self.most), -1)
        own_MK[:, 0] = tokens_M
        return self._pieces_NK[place_M.clamp(min=0)].where((place_M >= 0)[:, None], own_MK)

    def select(self, targets_M: Tensor, teacher_positions_M: Tensor) -> Batch:
        """What goes with a micro-batch, on the CPU.

        Args:
            targets_M: The student's next token at the positions with KL.
            teacher_positions_M: Where the teacher predicts its first piece.

        Returns:
            `merged_first` [G], `merged_group` and `merged_rank` [N], and for each position `merged_next_first`,
            `merged_begin` and `merged_end` [M], all as in `losses.Merged`; `rest_positions` [R] and `rest_targets` [R],
            where the teacher predicts the other pieces, and which; `rest_places` [M, K - 1], which of these R are a
            position's, R where there are no more.
        """
        pieces_MK = self.pieces(targets_M)
        there = pieces_MK[:, 1:] >= 0
        count = int(there.sum())
        places = torch.full(there.shape, count)
        places[there] = torch.arange(count)
        later = teacher_positions_M[:, None] + torch.arange(1, self.most)
        is_merged = targets_M >= self.width
        spans_M2 = self._spans_N2[(targets_M - self.width).clamp(min=0)].where(is_merged[:, None], 0)
        return self._fixed | {
            "merged_next_first": pieces_MK[:, 0],
            "merged_begin": spans_M2[:, 0],
            "merged_end": spans_M2[:, 1],
            "rest_positions": later[there],
            "rest_targets": pieces_MK[:, 1:][there],
            "rest_places": places,
        }


def merged_of(batch: Batch, rest_M: Tensor, width: int) -> Merged:
    """What `MergedTokens.select` gave, with what the teacher says of it."""
    return Merged(
        first_G=batch["merged_first"],
        group_N=batch["merged_group"],
        rank_N=batch["merged_rank"],
        next_first_M=batch["merged_next_first"],
        begin_M=batch["merged_begin"],
        end_M=batch["merged_end"],
        rest_M=rest_M,
        width=width,
    )


def same_bytes(
    ours: Sequence[int],
    theirs: Sequence[int],
    merged: Mapping[int, Sequence[int]],
    token_bytes: Sequence[int],
    *,
    begins: tuple[int, int] = (0, 0),
    kept: tuple[int, int] | None = None,
) -> dict[int, int]:
    """The place of one of our tokens -> the place in theirs of its first piece, where they have its pieces there.

    Args:
        ours: Ids of plain text, some of them merged.
        theirs: Ids of plain text, none of them merged.
        merged: Id -> pieces.
        token_bytes: By id, of all pieces and merged tokens.
        begins: At which byte of ours, and of theirs, the text begins that both have.
        kept: From and to which byte of that text theirs goes; all that ours has by default.
    """
    first, last = kept or (-begins[0], sum(token_bytes[i] for i in ours))
    ends = itertools.accumulate((token_bytes[i] for i in theirs), initial=-begins[1])
    places = {at: j for j, at in enumerate(ends)}
    found: dict[int, int] = {}
    end = -begins[0]
    for i, token in enumerate(ours):
        start, end = end, end + token_bytes[token]
        pieces = merged.get(token, (token,))
        j = places.get(start)
        if j is not None and start >= first and end <= last and list(theirs[j : j + len(pieces)]) == list(pieces):
            found[i] = j
    return found
