"""How far a student's attention is from a teacher's, and where attention goes.

Shape legend: B sequences, T student tokens of a sequence, U teacher tokens, K of them that make up one student token, Q
queries, G key-value groups, P mapped pairs of groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this a probability counts as zero. Far above float32's smallest number: the logarithm's gradient is its inverse,
# and must stay finite when the term's weight is multiplied in.
NO_MASS = 1e-30


def align_attention(teacher_BGQU: Tensor, key_tokens_BTK: Tensor) -> Tensor:
    """The teacher's attention on the student's tokens, [B, G, Q, T], of several of its tokens the sum.

    Args:
        teacher_BGQU: Probabilities over the teacher's tokens.
        key_tokens_BTK: int64, the teacher's tokens u of the student's token t in the same sequence; -1 where there are
            fewer, which adds 0.
    """
    groups, queries = teacher_BGQU.shape[1:3]

    def on(key_tokens_BT: Tensor) -> Tensor:
        index_BGQT = key_tokens_BT.clamp(min=0)[:, None, None].expand(-1, groups, queries, -1)
        return teacher_BGQU.gather(3, index_BGQT).where((key_tokens_BT >= 0)[:, None, None], 0.0)

    aligned_BGQT, *others = (on(key_tokens_BT) for key_tokens_BT in key_tokens_BTK.unbind(-1))
    return sum(others, start=aligned_BGQT)


def attention_distance(
    student_BGQT: Tensor, teacher_BHQT: Tensor, key_mask_BT: Tensor, head_map: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) between attention distributions, summed over queries.

        sum_q 1/P sum_(g, h) sum_t a_hqt log(a_hqt / b_gqt)

    with a the teacher's and b the student's attention, each renormalised over the shared keys. It is the attention
    transfer of MiniLM (Wang et al. 2020, eq. 6; there for the last layer only), where TinyBERT (Jiao et al. 2020,
    eq. 7) takes the squared difference of the scores. Zero when the two agree. A key that the student cannot see (a
    narrower sliding window) and the teacher does adds to the value but gives no gradient.

    Args:
        student_BGQT: Attention probabilities, zero for keys out of sight; all zero where there is no query.
        teacher_BHQT: The teacher's on the same tokens, for as many or as few groups; taken as a constant.
        key_mask_BT: bool, tokens that both models read.
        head_map: Pairs (student's group, teacher's group).

    Returns:
        The sum, and the number of queries in it as 0-d float32. A query counts if in every pair both sides have any
        mass on the shared keys; others add 0 and no gradient. Float32 at least, autocast off inside; never NaN.

    Raises:
        ValueError: No pairs, or a pair that names a group that is not there.
    """
    groups, teacher_groups = student_BGQT.shape[1], teacher_BHQT.shape[1]
    check_head_map(head_map, groups, teacher_groups)
    with torch.autocast(student_BGQT.device.type, enabled=False):
        # Stacked, not indexed by a list, which would wait for the device.
        student_BPQT = torch.stack([student_BGQT[:, g] for g, _ in head_map], 1)
        teacher_BPQT = torch.stack([teacher_BHQT[:, h] for _, h in head_map], 1).detach()
        log_b_BPQT, student_mass_BPQ = _log_renormalised(student_BPQT, key_mask_BT)
        log_a_BPQT, teacher_mass_BPQ = _log_renormalised(teacher_BPQT, key_mask_BT)
        counts_BQ = ((student_mass_BPQ > NO_MASS) & (teacher_mass_BPQ > NO_MASS)).all(1)
        used_BPQT = (counts_BQ[:, None, :, None] & key_mask_BT[:, None, None]) & (teacher_BPQT > NO_MASS)
        kl_BPQT = (log_a_BPQT.exp() * (log_a_BPQT - log_b_BPQT)).where(used_BPQT, 0.0)
        return kl_BPQT.sum() / len(head_map), counts_BQ.sum().float()


def check_head_map(head_map: Sequence[tuple[int, int]], groups: int, teacher_groups: int) -> None:
    """Refuse a map of key-value groups that does not fit the models.

    Raises:
        ValueError: No pairs, or a pair that names a group that is not there.
    """
    if not head_map or any(not (0 <= g < groups and 0 <= h < teacher_groups) for g, h in head_map):
        raise ValueError(
            f"objective.attention.heads: {[list(pair) for pair in head_map]} must be pairs of a student's key-value "
            f"group, 0 to {groups - 1}, and a teacher's, 0 to {teacher_groups - 1}."
        )


def _log_renormalised(p_BPQT: Tensor, key_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the probabilities over their mass on the shared keys, and that mass [B, P, Q]."""
    p_BPQT = p_BPQT if p_BPQT.dtype == torch.float64 else p_BPQT.float()
    mass_BPQ = p_BPQT.where(key_mask_BT[:, None, None], 0.0).sum(-1)
    return p_BPQT.clamp(min=NO_MASS).log() - mass_BPQ.clamp(min=NO_MASS).log()[..., None], mass_BPQ


def attention_mass(attention_BGQT: Tensor, segment_ids_BT: Tensor, segment: int) -> tuple[Tensor, Tensor]:
    """How much of the attention goes to the tokens of one segment.

    Args:
        attention_BGQT: Attention probabilities; all zero where there is no query.
        segment_ids_BT: Segment of each token.
        segment: The segment asked about.

    Returns:
        Sum over queries of the share, which is the mean over groups, and the number of queries, 0-d float32 both.
    """
    with torch.autocast(attention_BGQT.device.type, enabled=False):
        attention_BQT = attention_BGQT.float().mean(1)
        share_BQ = attention_BQT.where((segment_ids_BT == segment)[:, None], 0.0).sum(-1)
        mass_BQ = attention_BQT.sum(-1)
        share_BQ = share_BQ / mass_BQ.where(mass_BQ > 0, 1.0)
        return share_BQ.sum(), (mass_BQ > 0).sum().float()


def uniform_head_map(student_groups: int, teacher_groups: int) -> list[tuple[int, int]]:
    """Each of the student's key-value groups with a teacher's at the same relative place: i with floor(i G_t / G_s)."""
    return [(i, i * teacher_groups // student_groups) for i in range(student_groups)]
