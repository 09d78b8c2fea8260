"""Attention probabilities of a few queries, read beside whatever attention kernel the model runs.

Fused kernels return no probabilities (transformers' sdpa hands out None without a word), and the eager one forms all
T x T of them. Here the queries and keys are taken as they leave their projections, and only the rows of the sampled
queries are formed.

Shapes: B batch, T sequence, Q sampled queries of a sequence, H query heads, G key-value heads, d width of a head.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Where each class keeps its sliding window. Only these are read: others share the names of the parts but rotate or
# normalise differently (interleaved rotation, norms after the transpose, capped scores, sinks), which no look at the
# module would tell. Each is tested against its own eager attention.
_WINDOW: Mapping[str, Callable[[Any], int | None]] = {
    "LlamaAttention": lambda attention: None,
    "MistralAttention": lambda attention: attention.config.sliding_window,
    "MixtralAttention": lambda attention: attention.config.sliding_window,
    "Qwen2Attention": lambda attention: attention.sliding_window,
    "Qwen3Attention": lambda attention: attention.sliding_window,
    "Qwen3MoeAttention": lambda attention: attention.sliding_window,
}


class QueriesKeys(NamedTuple):
    """Queries and keys of one layer before rotation, and how to score them."""

    q_BTHd: Tensor
    k_BTGd: Tensor
    cos: Tensor  # [B, T, d], or [1, T, d]
    sin: Tensor
    scale: float
    window: int | None  # a query sees so many keys, its own among them; None: all


def unreadable(model: nn.Module) -> str | None:
    """Name of the first attention class of a causal model that cannot be read; None if all can."""
    layers: Any = model.model.layers  # type: ignore[union-attr]
    for layer in layers:
        kind = type(getattr(layer, "self_attn", layer))
        if kind.__name__ not in _WINDOW or not kind.__module__.startswith("transformers.models."):
            return kind.__name__
    return None


def check_readable(model: nn.Module, key: str = "objective.attention") -> None:
    """Refuse a model whose attention cannot be read; weights are not looked at, so it may lie on the meta device.

    Args:
        model: A causal model with `.model.layers`.
        key: Who asks, for the sentence.

    Raises:
        ValueError: Names the class, and those that can be read.
    """
    name = unreadable(model)
    if name is not None:
        known = ", ".join(sorted(known.removesuffix("Attention") for known in _WINDOW))
        raise ValueError(f"{key} cannot read {name}: use a model of the families {known}, or take the term out.")


@contextmanager
def capture_queries_keys(layers: Sequence[nn.Module]) -> Iterator[list[QueriesKeys]]:
    """Collect queries and keys of decoder layers during one forward pass, in the order given.

    The list is filled when the block ends. The hooks keep references and compute nothing: under activation
    checkpointing the layer runs again without them, and must then find the same operations. All the queries and keys
    stay in memory until they are let go, which is why `capture_attention` exists.
    """
    captured: list[QueriesKeys] = []
    with _tapped(layers) as taps:
        yield captured
    captured.extend(tap.queries_keys() for tap in taps)


@contextmanager
def capture_attention(layers: Sequence[nn.Module], batch: Mapping[str, Tensor]) -> Iterator[list[Tensor]]:
    """Collect `attention_at` of decoder layers during one forward pass, in the order given.

    The list is filled when the block ends. Without gradient each layer is worked out as it runs, so that queries and
    keys of only one layer are held.
    """
    attention: list[Tensor] = []
    if torch.is_grad_enabled():
        with capture_queries_keys(layers) as captured:
            yield attention
        captured.reverse()
        while captured:
            attention.append(attention_at(captured.pop(), batch))
        return
    found: dict[int, Tensor] = {}
    with _tapped(layers) as taps:

        def work_out(tap: _Tap) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                found[id(tap)] = attention_at(tap.queries_keys(), batch)
                tap.seen.clear()

            return hook

        for tap in taps:
            tap.handles.append(tap.attention.register_forward_hook(work_out(tap)))
        yield attention
    attention.extend(found[id(tap)] for tap in taps)


def attention_at(qk: QueriesKeys, batch: Mapping[str, Tensor]) -> Tensor:
    """Attention probabilities of sampled queries over the tokens of their sequence; differentiable.

    softmax(scale (R_t q_t) . (R_s k_s)) over the keys s of the query's own packed row with s <= t (and t - s < window),
    then the mean over the query heads of each key-value head (Ainslie et al. 2023), so that models with different
    numbers of query heads can be compared.

    Args:
        qk: One layer's queries and keys.
        batch: `queries` int64 [B, Q], places t in their sequence, -1 for none; `position_ids` int64 [B, T], restarting
            at each row.

    Returns:
        [B, G, Q, T] float32 (float64 where the model is). Zero for every other key; all zero, with zero gradient, for a
        query of -1. Autocast is off inside.
    """
    batch_size, tokens, heads, width = qk.q_BTHd.shape
    groups = qk.k_BTGd.shape[2]
    queries_BQ = batch["queries"]
    at_BQ = queries_BQ.clamp(min=0)
    first_B1 = torch.arange(batch_size, device=at_BQ.device)[:, None] * tokens
    cos, sin = (part.expand(batch_size, -1, -1).unsqueeze(2) for part in (qk.cos, qk.sin))

    def pick(x: Tensor) -> Tensor:
        return x.flatten(0, 1)[first_B1 + at_BQ]

    with torch.autocast(at_BQ.device.type, enabled=False):
        # Rotated in the model's own type, as it does itself; scores and softmax are in float32.
        q_BQHd = _rotated(pick(qk.q_BTHd), pick(cos), pick(sin))
        k_BTGd = _rotated(qk.k_BTGd, cos, sin)
        dtype = torch.float64 if k_BTGd.dtype == torch.float64 else torch.float32
        # Query head h belongs to key-value head h // (H / G), so heads and queries of a group make one matrix.
        q_BGRd = (q_BQHd.to(dtype) * qk.scale).transpose(1, 2).reshape(batch_size, groups, -1, width)
        scores_BGRT = q_BGRd @ k_BTGd.to(dtype).permute(0, 2, 3, 1)
        scores_BGHQT = scores_BGRT.view(batch_size, groups, heads // groups, -1, tokens)
        seen_BQT = _visible(at_BQ, batch["position_ids"], qk.window)
        p_BGHQT = scores_BGHQT.masked_fill(~seen_BQT[:, None, None], -torch.inf).softmax(-1)
        return p_BGHQT.mean(2) * (queries_BQ >= 0)[:, None, :, None]


def _visible(at_BQ: Tensor, position_ids_BT: Tensor, window: int | None) -> Tensor:
    """[B, Q, T]: the keys that a query sees, always its own among them."""
    start_BQ = at_BQ - position_ids_BT.gather(1, at_BQ)
    key_T = torch.arange(position_ids_BT.shape[1], device=at_BQ.device)
    seen_BQT = (key_T >= start_BQ[:, :, None]) & (key_T <= at_BQ[:, :, None])
    return seen_BQT if window is None else seen_BQT & (at_BQ[:, :, None] - key_T < window)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs half a head apart (Su et al. 2021, in the layout of GPT-NeoX)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Tap:
    """Hooks on one attention module, and what they have seen."""

    def __init__(self, attention: Any):
        self.attention = attention
        self.seen: dict[str, Any] = {}
        # Qwen3 normalises each head after the projection, and reshapes before that.
        q, k = (getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj")) for name in "qk")
        self.handles: list[RemovableHandle] = [
            q.register_forward_hook(self._keep("q")),
            k.register_forward_hook(self._keep("k")),
            attention.register_forward_pre_hook(self._keep_rotation, with_kwargs=True),
        ]

    def queries_keys(self) -> QueriesKeys:
        """What one forward pass has shown."""
        width = self.attention.head_dim
        q, k = (self.seen[name] for name in "qk")
        cos, sin = self.seen["rotation"]
        assert cos.shape[-1] == width, "a part of the head is not rotated"
        return QueriesKeys(
            q.view(*q.shape[:2], -1, width),
            k.view(*k.shape[:2], -1, width),
            cos,
            sin,
            self.attention.scaling,
            _WINDOW[type(self.attention).__name__](self.attention),
        )

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen[name] = output

        return hook

    def _keep_rotation(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> None:
        self.seen["rotation"] = kwargs["position_embeddings"]


@contextmanager
def _tapped(layers: Sequence[nn.Module]) -> Iterator[list[_Tap]]:
    taps = [_Tap(layer.self_attn) for layer in layers]
    try:
        yield taps
    finally:
        for tap in taps:
            for handle in tap.handles:
                handle.remove()
