"""What a run costs, as arithmetic: floating-point operations, bytes, hours. Bytes are bytes, GB are 10^9 of them.

Shapes: T tokens of a sequence, N rows of the loss, M of them with a teacher, D width, V vocabulary, L layers, H heads
of d.
"""

import math
from typing import NamedTuple

from agri_moe.losses.logits import CHUNK_SIZE, cpu_block_rows

PEAK_FLOPS = {"bf16": 989e12, "32": 67e12}
"""FLOP/s of an H100 SXM without sparsity (NVIDIA H100 data sheet): bfloat16 on tensor cores, and float32 off them, as
PyTorch multiplies by default."""
ASSUMED_SHARE = 0.5
"""Share of that peak which a step is assumed to reach where no throughput is given: what the project aims for."""
RESERVED = 1_500_000_000
"""Bytes of a GPU that are not the step's: the CUDA context with its kernels, and workspaces of cuBLAS and NCCL."""
CACHED_LOGITS = 127
"""Bytes of a teacher's 50 best logits at one token, as a cache on disk may hold them."""

# ---------------------------------------------------------------------- operations


class Matrices(NamedTuple):
    """What of a model multiplies: numbers, not bytes."""

    body: int  # of the layers' matrices, those that one token visits (top-k of the experts)
    body_trained: int  # those of them that learn
    attention: int  # L H d: width of what attends, over all layers
    head: int  # V D
    head_trained: bool


class Work(NamedTuple):
    """Floating-point operations for one token of the student's sequence, a multiplication and an addition being two."""

    teacher_body: float
    teacher_head: float
    anchor: float
    forward_body: float
    forward_attention: float
    recomputed: float
    backward_body: float
    backward_attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def work(
    student: Matrices,
    teacher: Matrices | None,
    anchor: Matrices | None,
    *,
    length: int,
    teacher_length: int,
    supervised: float,
    taught: float,
    recompute: bool,
) -> Work:
    """Operations of a step for one token of the student's sequence.

    A product with a matrix takes 2 operations for each of its numbers, its input's gradient as many, and its own
    gradient as many, which frozen ones spare. Attention takes 4 T H d for a token in each layer, since the kernels work
    through the whole T x T block whatever the mask, and 2.5 times that in its backward pass, which works the scores out
    again (Dao 2023, FlashAttention-2). Norms, routers' softmax and the terms on samples are left out.

    Args:
        student: Matrices of the student.
        teacher: Of the teacher, if there is one.
        anchor: Of the dense source, if a term compares with it.
        length: T.
        teacher_length: The same as the teacher reads it.
        supervised: Share of the tokens at which the student predicts.
        taught: Share of the tokens at which the teacher does.
        recompute: Whether the layers' forward pass is made twice, as under gradient checkpointing.
    """
    ratio = teacher_length / length
    body, attention = 2 * student.body, 4 * length * student.attention
    return Work(
        teacher_body=0 if teacher is None else ratio * (2 * teacher.body + 4 * teacher_length * teacher.attention),
        teacher_head=0 if teacher is None else taught * 2 * teacher.head,
        anchor=0 if anchor is None else 2 * anchor.body + 4 * length * anchor.attention,
        forward_body=body,
        forward_attention=attention,
        recomputed=(body + attention) * recompute,
        backward_body=body + 2 * student.body_trained,
        backward_attention=2.5 * attention,
        head=supervised * 2 * student.head * (2 + student.head_trained),
    )


# ---------------------------------------------------------------------- memory


class LossShape(NamedTuple):
    """What the fused loss reads: rows, matrices, and bytes of a number of each."""

    rows: int  # N
    taught: int  # M
    student: tuple[int, int]  # V, D
    teacher: tuple[int, int]
    hidden_size: int
    student_size: int
    teacher_size: int
    operand_size: int  # in the matrix products
    tempered: bool  # whether the divergence has a temperature other than 1


def loss_workspace(shape: LossShape, *, accelerator: bool) -> int:
    """Bytes that `fused_ce_kl` holds beside inputs and gradients: logits of a chunk, operands in other types."""
    (vocabulary, width), (teacher_vocabulary, teacher_width) = shape.student, shape.teacher
    shared = min(vocabulary, teacher_vocabulary) if shape.taught else 0
    chunk, taught = min(CHUNK_SIZE, shape.rows), min(CHUNK_SIZE, shape.taught)
    logits = 4 * (chunk * vocabulary + taught * shared)
    block = 1 if accelerator else min(1, cpu_block_rows(vocabulary) / CHUNK_SIZE)
    again = shape.tempered or shared != vocabulary  # whether the student's logits are normalised a second time
    passes = int(block * 4 * (chunk * vocabulary + taught * shared * (1 + again)))
    size = shape.operand_size
    gradient = size * chunk * vocabulary * (size != 4)
    operands = (
        (vocabulary * width, shape.student_size),
        (shape.rows * width, shape.hidden_size),
        (shared * teacher_width, shape.teacher_size),
        (shape.taught * teacher_width, shape.teacher_size),
    )
    return logits + passes + gradient + sum(count * size * (size != stored) for count, stored in operands)


class Pieces(NamedTuple):
    """Parameters of a model by how FSDP2 gathers them: numbers, not bytes."""

    total: int
    trained: int
    layer: int  # of the largest layer
    root: int  # of what stands in no layer: embedding, head, last norm, projections


def gathered(pieces: Pieces, size: int, *, root: bool = True) -> int:
    """Bytes of what a rank holds whole at a time under FSDP2: the layer in use, the next one, what is in no layer.

    Args:
        pieces: The model's.
        size: Bytes of a number in the type of the computation.
        root: Whether what is in no layer stays from the forward to the backward pass, as where a loss is inside.
    """
    return size * (2 * pieces.layer + pieces.root * root)


def reduced(pieces: Pieces, size: int) -> int:
    """Bytes of a layer's gradients on their way to the ranks that own them: as they come, and in float32."""
    return (size + 4) * min(pieces.layer, pieces.trained)


# ---------------------------------------------------------------------- time and disk


def default_throughput(precision: str) -> float:
    """FLOP/s that are assumed of an H100 in one of Lightning's precisions."""
    return ASSUMED_SHARE * PEAK_FLOPS["bf16" if precision.startswith("bf16") else "32"]


def epoch_steps(sequences: int, *, per_batch: int, ranks: int, accumulate: int, limit: int | float) -> int:
    """Optimizer steps of an epoch, as the sampler and Lightning count them.

    Args:
        sequences: Packed sequences of the training rows.
        per_batch: Sequences of a micro-batch on one rank.
        ranks: Of the run.
        accumulate: Micro-batches of a step.
        limit: `trainer.limit_train_batches`: a number of micro-batches, or a share of them.
    """
    batches = math.ceil(sequences / (per_batch * ranks))
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / accumulate)
