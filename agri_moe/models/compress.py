"""From a trained Mixture-of-Experts to one with a shared core: one FFN per layer, and low-rank wrappers per expert.

Each expert's FFN is first brought into one order of neurons: an FFN does not change when its neurons change places,
when the sign of a neuron's up and down turns, or when one is scaled against the other (as in Git Re-Basin, Ainsworth et
al. 2023, arXiv 2209.04836), and experts that were not made from one FFN have orders of their own. The core begins as
the mean of the matched experts. Given a core, the wrappers that come nearest to an expert are a reduced-rank
regression, which has a closed form (Izenman 1975); given the wrappers, so is the core that comes nearest to all. One is
solved after the other, `ROUNDS` times.

Near is meant on the tokens that an expert is given, if rows to calibrate on are named: the input wrapper is fitted to
what its neurons read there, the output wrapper to what the expert answers there, from the neurons as they have become,
so that it makes good some of the input's error. Without rows it is meant in the weights.

Shapes: N tokens, n tokens of one expert, D model width, F expert width, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from agri_moe.data.chat_data import ChatDataModule
from agri_moe.models.checkpoint_files import (
    checkpoint_folder,
    copy_companions,
    load_config,
    new_checkpoint,
)
from agri_moe.models.sharding import place
from agri_moe.models.shared_core import SharedCoreExperts, SharedCoreForCausalLM, shared_core_config, sparse_layers
from agri_moe.models.source import ModelConfig
from agri_moe.models.upcycle import stored_placed, unreadable, write_moe_config

RECORD = "compression.json"
ROUNDS = 4
HELD_OUT = 0.1  # of the calibration tokens, on which the error is told
RANKED = 8  # experts of a layer whose differences are decomposed for the report: 128 would take longer than the fit
RIDGE = 1e-4  # over the mean of a covariance's diagonal


# ---- one layer's experts


class Experts(NamedTuple):
    """The experts of a layer in float32."""

    gate_EFD: Tensor
    up_EFD: Tensor
    down_EDF: Tensor

    @classmethod
    def of(cls, gate_up_EFD: Tensor, down_EDF: Tensor) -> Experts:
        """From the fused parameters that transformers has."""
        gate, up = gate_up_EFD.float().chunk(2, dim=1)
        return cls(gate, up, down_EDF.float())

    @property
    def gate_up(self) -> Tensor:
        """Gate above up, [E, 2F, D]."""
        return torch.cat([self.gate_EFD, self.up_EFD], dim=1)


class Tokens(NamedTuple):
    """What an expert is fitted on: inputs [n, D], and how much each counts [n]."""

    x_nD: Tensor
    counts_n: Tensor


class Core(NamedTuple):
    """The FFN that the experts share: gate above up [2F, D], and down [D, F]."""

    gate_up: Tensor
    down: Tensor


class Wrappers(NamedTuple):
    """I + up down of each expert: up [E, D, R], down [E, R, D]."""

    up: Tensor
    down: Tensor

    def matrices(self) -> Tensor:
        """[E, D, D]."""
        return torch.eye(self.up.shape[1]).to(self.up) + self.up @ self.down


def matched(experts: Experts) -> Experts:
    """The same experts with their neurons in one order, of one sign, and up and down of equal norm.

    Neurons are matched with those of the first expert, and then with the mean of all until they come no nearer.
    """
    start = balanced(experts)
    found, _ = aligned(start, Experts(*(part[0] for part in start)))
    likeness = 0.0
    while True:
        found, now = aligned(found, Experts(*(part.mean(0) for part in found)))
        if now <= likeness * (1 + 1e-5):
            return found
        likeness = now


def aligned(experts: Experts, reference: Experts) -> tuple[Experts, float]:
    """Experts whose neurons are those of the reference, [F, D], [F, D] and [D, F], as far as they can be; how alike.

    A linear assignment for each, over the inner products of their neurons' three vectors.
    """
    gate, up, down = (part.clone() for part in experts)
    likeness = 0.0
    for e in range(len(gate)):
        signed = reference.up_EFD @ up[e].T + reference.down_EDF.T @ down[e]
        alike = reference.gate_EFD @ gate[e].T + signed.abs()
        rows, order = map(torch.as_tensor, linear_sum_assignment(alike.cpu().numpy(), maximize=True))
        likeness += float(alike[rows, order].sum())
        signs = torch.where(signed[rows, order] < 0, -1.0, 1.0)
        gate[e], up[e], down[e] = gate[e][order], up[e][order] * signs[:, None], down[e][:, order] * signs
    return Experts(gate, up, down), likeness


def balanced(experts: Experts) -> Experts:
    """The same functions, each neuron's up and down of equal norm."""
    gate, up, down = experts
    norms = up.norm(dim=2), down.norm(dim=1)
    # A neuron that answers nothing, such as one that pads a narrower expert, stays as it is.
    scale_EF = torch.where(norms[0] * norms[1] > 0, norms[1] / norms[0].clamp(min=1e-30), 1.0).sqrt()
    return Experts(gate, up * scale_EF[..., None], down / scale_EF[:, None, :])


def shared(
    experts: Experts, rank: int, tokens: Sequence[Tokens] | None, act: Callable[[Tensor], Tensor]
) -> tuple[Core, Wrappers, Wrappers]:
    """Core, input wrappers and output wrappers that come nearest to matched experts.

    Args:
        experts: In one order of neurons.
        rank: R.
        tokens: Of each expert; None fits the weights.
        act: The gate's activation.
    """
    covariances = [covariance(t) for t in tokens] if tokens else None
    core = Core(experts.gate_up.mean(0), experts.down_EDF.mean(0))
    inputs = input_wrappers(core.gate_up, experts.gate_up, covariances, rank)
    for _ in range(ROUNDS):
        core = core._replace(gate_up=nearest_gate_up(experts.gate_up, inputs.matrices(), covariances))
        inputs = input_wrappers(core.gate_up, experts.gate_up, covariances, rank)
    seen = hidden_pairs(experts.gate_up, core.gate_up @ inputs.matrices(), tokens, act)
    outputs = output_wrappers(core.down, experts.down_EDF, seen, rank)
    for _ in range(ROUNDS):
        core = core._replace(down=nearest_down(core.down, experts.down_EDF, outputs.matrices(), seen))
        outputs = output_wrappers(core.down, experts.down_EDF, seen, rank)
    return core, inputs, outputs


def covariance(tokens: Tokens) -> Tensor:
    """Second moments [D, D] of an expert's inputs, made safely invertible."""
    x_nD, counts_n = tokens
    moments = (x_nD * counts_n[:, None]).T @ x_nD
    return moments + ridge(moments)


def ridge(moments: Tensor) -> Tensor:
    """What makes second moments safely invertible."""
    return RIDGE * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)


def strongest(matrix: Tensor, rank: int) -> Tensor:
    """The left singular vectors of the largest singular values, [rows, rank]; zeros where there are fewer.

    By random projection (Halko et al. 2011, arXiv 0909.4061, algorithm 5.1 with power iterations): a whole
    decomposition, for each of 128 experts, of 48 layers and in each round, would take hours on a GPU.
    """
    sketch = min(rank + 16, *matrix.shape)
    found = torch.svd_lowrank(matrix, q=sketch, niter=6)[0][:, :rank]
    return nn.functional.pad(found, (0, rank - found.shape[1]))


def input_wrappers(core: Tensor, gate_up: Tensor, covariances: Sequence[Tensor] | None, rank: int) -> Wrappers:
    """Of each expert the A = I + up down that brings `core A` nearest to its gate and up [2F, D] on its inputs."""
    basis, values, rows = torch.linalg.svd(core, full_matrices=False)
    kept = values > values[0] * 1e-3
    basis, inverse = basis[:, kept], rows[kept].T / values[kept]
    ups, downs = [], []
    for e, target in enumerate(gate_up):
        change = basis.T @ (target - core)  # what lies outside of the core's range no wrapper can reach
        root = torch.linalg.cholesky(covariances[e]) if covariances else torch.eye(core.shape[1]).to(core)
        best = strongest(change @ root, rank)
        ups.append(inverse @ best)
        downs.append(best.T @ change)
    return evened(torch.stack(ups), torch.stack(downs))


def nearest_gate_up(gate_up: Tensor, wrappers: Tensor, covariances: Sequence[Tensor] | None) -> Tensor:
    """The core [2F, D] whose products with the wrappers A [E, D, D] come nearest to all experts' gate and up."""
    seen = wrappers if covariances is None else wrappers @ torch.stack(list(covariances))
    left = (gate_up @ seen.transpose(1, 2)).sum(0)
    right = (seen @ wrappers.transpose(1, 2)).sum(0)
    return torch.linalg.solve(right, left.T).T


class Hidden(NamedTuple):
    """Second moments of an expert's neurons as they have become, [F, F], and of what they were with them, [F, F]."""

    now: Tensor
    before_now: Tensor


def hidden_pairs(
    gate_up: Tensor, changed: Tensor, tokens: Sequence[Tokens] | None, act: Callable[[Tensor], Tensor]
) -> list[Hidden]:
    """For each expert; without tokens every neuron counts alike and has not changed."""
    pairs = []
    for e in range(len(gate_up)):
        if tokens is None:
            same = torch.eye(gate_up.shape[1] // 2).to(gate_up)
            pairs.append(Hidden(same, same))
            continue
        x_nD, counts_n = tokens[e]
        before, now = (_neurons(x_nD, weight, act) for weight in (gate_up[e], changed[e]))
        weighted = now * counts_n[:, None]
        moments = now.T @ weighted
        pairs.append(Hidden(moments + ridge(moments), before.T @ weighted + ridge(moments)))
    return pairs


def _neurons(x_nD: Tensor, gate_up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = (x_nD @ gate_up.T).chunk(2, dim=-1)
    return act(gate) * up


def output_wrappers(core: Tensor, down: Tensor, hidden: Sequence[Hidden], rank: int) -> Wrappers:
    """Of each expert the B = I + up down that brings the answers of `B core` nearest to its own."""
    ups, downs = [], []
    for target, (now, before_now) in zip(down, hidden, strict=True):
        answers = core @ now @ core.T  # second moments of the core's answers, [D, D]
        answers = answers + ridge(answers)
        change = torch.linalg.solve(answers, core @ (target @ before_now - core @ now).T).T
        best = strongest(change @ torch.linalg.cholesky(answers), rank)
        ups.append(best)
        downs.append(best.T @ change)
    return evened(torch.stack(ups), torch.stack(downs))


def nearest_down(core: Tensor, down: Tensor, wrappers: Tensor, hidden: Sequence[Hidden], steps: int = 50) -> Tensor:
    """The core's down [D, F] whose answers through the wrappers B [E, D, D] come nearest to all experts' own.

    The normal equations, sum_e B' B core H = sum_e B' down H', are solved by conjugate gradients from `core`: as a
    matrix they would have (D F)^2 entries.
    """
    squares = wrappers.transpose(1, 2) @ wrappers
    now = torch.stack([pair.now for pair in hidden])
    wanted = (wrappers.transpose(1, 2) @ down @ torch.stack([pair.before_now for pair in hidden])).sum(0)
    rest = wanted - (squares @ core @ now).sum(0)
    direction, size = rest, rest.square().sum()
    for _ in range(steps):
        if size <= 1e-8 * wanted.square().sum():
            break
        product = (squares @ direction @ now).sum(0)
        step = size / (direction * product).sum()
        core, rest = core + step * direction, rest - step * product
        direction, size = rest + rest.square().sum() / size * direction, rest.square().sum()
    return core


def evened(up: Tensor, down: Tensor) -> Wrappers:
    """The same products from factors of equal norm, which learn at one pace; zeros stay zeros."""
    scale = (down.norm(dim=(1, 2), keepdim=True) / up.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)).sqrt()
    scale = scale.clamp(min=1e-10)
    return Wrappers(up * scale, down / scale)


# ---- how well a layer is kept


@dataclass(frozen=True)
class LayerReport:
    """What a layer's experts have in common, and what compression leaves of them.

    Args:
        layer: Number of the decoder layer.
        input_rank: Effective rank (Roy & Vetterli 2007) of an expert's difference from the core, gate above up; mean
            over at most RANKED experts.
        output_rank: The same of down.
        cosine: Mean cosine between the differences of two experts; E unrelated ones and their mean have -1 / (E - 1).
        weight_error: Relative error of the experts' weights.
        output_error: Relative error of the layer's output, mean over tokens that nothing was fitted on; None without
            calibration.
        size: Parameters of the layer's experts over those that they had.
    """

    layer: int
    input_rank: float
    output_rank: float
    cosine: float
    weight_error: float
    output_error: float | None
    size: float


def effective_rank(matrix: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 of a matrix of zeros."""
    values = torch.linalg.svdvals(matrix)
    if not values.sum() > 0:
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine between two different rows; 0 where there are no two rows that are not zero."""
    unit = nn.functional.normalize(rows[rows.norm(dim=1) > 0], dim=1)
    pairs = len(unit) * (len(unit) - 1)
    return float((unit.sum(0).square().sum() - len(unit)) / pairs) if pairs else 0.0


def look_at(
    layer: int, experts: Experts, core: Core, inputs: Wrappers, outputs: Wrappers, output_error: float | None
) -> LayerReport:
    """Measure a layer."""
    first, second = experts.gate_up - core.gate_up, experts.down_EDF - core.down
    errors = [core.gate_up @ inputs.matrices() - experts.gate_up, outputs.matrices() @ core.down - experts.down_EDF]
    squares = [sum(float(t.square().sum()) for t in two) for two in (errors, (experts.gate_up, experts.down_EDF))]
    kept = sum(t.numel() for t in (*core, *inputs, *outputs))
    ranked = range(0, len(first), -(-len(first) // RANKED))
    return LayerReport(
        layer,
        input_rank=fmean(effective_rank(first[e]) for e in ranked),
        output_rank=fmean(effective_rank(second[e]) for e in ranked),
        cosine=mean_cosine(torch.cat([first.flatten(1), second.flatten(1)], dim=1)),
        weight_error=(squares[0] / squares[1]) ** 0.5,
        output_error=output_error,
        size=kept / sum(t.numel() for t in experts),
    )


# ---- a layer in its model


def expert_tokens(x_ND: Tensor, weights_NE: Tensor, seed: int) -> list[Tokens]:
    """What each expert is fitted on: its own tokens by the square of their routing weight, and a little of all others.

    An expert that few tokens chose would be fitted on fewer than it has dimensions. So each is given, beside its own,
    the same sample of all tokens, which counts as much as D tokens of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    width = x_ND.shape[1]
    common = x_ND[torch.randperm(len(x_ND), generator=generator)[: 2 * width].to(x_ND.device)]
    squares_NE = weights_NE.square()
    share = squares_NE.sum() / (weights_NE > 0).sum() * width / len(common)
    found = []
    for e in range(weights_NE.shape[1]):
        own = weights_NE[:, e] > 0
        counts = torch.cat([squares_NE[own, e], share.expand(len(common))])
        found.append(Tokens(torch.cat([x_ND[own], common]), counts))
    return found


def answers(x_ND: Tensor, weights_NE: Tensor, gate_up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """What a layer of experts answers, [N, D]."""
    total_ND = torch.zeros_like(x_ND)
    for e in range(weights_NE.shape[1]):
        own = weights_NE[:, e] > 0
        total_ND[own] += weights_NE[own, e, None] * (_neurons(x_ND[own], gate_up[e], act) @ down[e].T)
    return total_ND


def compress_layer(number: int, mlp: Any, experts: Experts, inputs_ND: Tensor | None, rank: int) -> LayerReport:
    """Fit a shared core to a layer's experts and write it into `mlp`, whose router has its values already."""
    module: SharedCoreExperts = mlp.experts
    experts, act = matched(experts), module.act_fn
    tokens = None
    if inputs_ND is not None:
        weights_NE = routing_weights(mlp.gate, inputs_ND).to(experts.gate_EFD.device)
        x_ND = inputs_ND.to(weights_NE)
        held_out = round(HELD_OUT * len(x_ND))
        tokens = expert_tokens(x_ND[held_out:], weights_NE[held_out:], seed=number)
    with torch.random.fork_rng():
        torch.manual_seed(number)
        core, before, after = shared(experts, rank, tokens, act)
    error = None
    if inputs_ND is not None:
        x_ND, weights_NE = x_ND[:held_out], weights_NE[:held_out]
        wanted = answers(x_ND, weights_NE, experts.gate_up, experts.down_EDF, act)
        found = answers(x_ND, weights_NE, core.gate_up @ before.matrices(), after.matrices() @ core.down, act)
        error = float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())
    gate, up = core.gate_up.chunk(2)
    for name, value in {"gate_proj": gate, "up_proj": up, "down_proj": core.down}.items():
        place(getattr(module.shared_core, name).weight, value)
    for wrapper, fitted in ((module.input_wrapper, before), (module.output_wrapper, after)):
        place(wrapper.up, fitted.up)
        place(wrapper.down, fitted.down)
    return look_at(number, experts, core, before, after, error)


def routing_weights(router: Any, x_ND: Tensor) -> Tensor:
    """Weight of each expert for each token, 0 where it is not chosen, [N, E] in float32."""
    _, weights_NK, chosen_NK = router(x_ND.to(router.weight))
    zeros_NE = weights_NK.new_zeros(len(x_ND), router.num_experts, dtype=torch.float32)
    return zeros_NE.scatter_(1, chosen_NK, weights_NK.float())


# ---- a whole model


@dataclass(frozen=True)
class Calibration:
    """Rows on which the experts are watched.

    Args:
        files: Chat rows, as `data.train` takes them.
        columns: Our column -> the one in the files.
        tokens: How many tokens are read.
        max_length: Longer rows are left out.
    """

    files: str | list[str]
    columns: dict[str, str]
    tokens: int
    max_length: int


def check(source: str, rank: int) -> PreTrainedConfig:
    """The config of the compressed model, from the source's config and headers alone.

    Raises:
        ValueError: If the source is no Qwen3-MoE that can be read piece by piece, or the rank would save nothing.
    """
    config = load_config(source, "--source")
    if config.model_type != "qwen3_moe":
        raise ValueError(f"--source: {source} is a {config.model_type} model; only a qwen3_moe can be compressed.")
    if reason := unreadable(source):
        raise ValueError(f"--source: {source} cannot be read, because {reason}.")
    if rank < 8 or rank % 8:
        raise ValueError(f"--rank is {rank}: it must be a positive multiple of 8, as grouped products on GPUs ask.")
    experts, width, inner = config.num_local_experts, config.hidden_size, config.moe_intermediate_size
    if rank > (most := min((experts - 1) * 3 * inner // (4 * experts), width) // 8 * 8):
        raise ValueError(f"--rank is {rank}: above {most} nothing is saved of the experts of {source}.")
    return shared_core_config(config, rank)


def compress(
    source: str, rank: int, calibration: Calibration | None, device: str
) -> tuple[SharedCoreForCausalLM, list[LayerReport]]:
    """The compressed model on the CPU, in the type that the source is stored in, and a report on each MoE layer.

    Memory: the compressed model and one layer of the source; to calibrate, the whole source on `device` before that,
    and the inputs of its MoE layers for the calibration tokens on the CPU.

    Args:
        source: Folder or hub name of a Qwen3-MoE in safetensors.
        rank: Of the wrappers.
        calibration: Rows to fit on; None fits the weights.
        device: Where the source answers and the layers are fitted.

    Raises:
        ValueError: See `check`; or if the rows cannot be read or are too few.
    """
    config = check(source, rank)
    inputs = None if calibration is None else layer_inputs(source, calibration, device)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    reports: list[LayerReport] = []
    with torch.no_grad():
        for number, gate_up, down in experts_of(source, model):
            experts = Experts.of(gate_up.to(device), down.to(device))
            layer_input = inputs[len(reports)] if inputs else None
            reports.append(compress_layer(number, model.model.layers[number].mlp, experts, layer_input, rank))
    model.tie_weights()
    return model.eval(), reports


def experts_of(source: str, model: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number, gate above up [E, 2F, D] and down [E, D, F] of each MoE layer, one after the other.

    All other tensors are written into `model` on the way; a layer's router before its experts are given.
    """
    parameters = dict(model.named_parameters())
    number, fused = -1, dict[str, Tensor]()
    for target, tensor in stored_placed(source):
        if fused and target.layer != number:
            yield number, fused.pop("gate_up_proj"), fused.pop("down_proj")
        if target.expert < 0:
            place(parameters[target.memory], tensor, target.offset)
            continue
        number, name = target.layer, target.memory.rsplit(".", 1)[1]
        if name not in fused:
            config = model.config
            inner, width = config.moe_intermediate_size, config.hidden_size
            shape = (width, inner) if name == "down_proj" else (2 * inner, width)
            fused[name] = tensor.new_empty(config.num_local_experts, *shape)
        place(fused[name], tensor, target.offset)
    if fused:
        yield number, fused.pop("gate_up_proj"), fused.pop("down_proj")


def layer_inputs(source: str, calibration: Calibration, device: str) -> list[Tensor]:
    """What each MoE layer reads on the calibration rows, [tokens, D] on the CPU."""
    data = ChatDataModule(
        train=calibration.files,
        tokenizer=source,
        columns=calibration.columns,
        max_length=calibration.max_length,
        bad_rows="skip",
    )
    data.check()
    loaded = data.read("train").rows
    if not len(loaded):
        raise ValueError(f"--calibration: {calibration.files} has no usable row of at most {data.max_length} tokens.")
    # Files are often sorted, and the first rows then like no others.
    order = torch.randperm(len(loaded), generator=torch.Generator().manual_seed(0)).tolist()
    config = load_config(source, "--source")
    model = ModelConfig(source).load("--source", data.chat, dtype=config.dtype).eval().to(device)
    layers = sparse_layers(model)
    inputs: list[list[Tensor]] = [[] for _ in layers]
    for kept, layer in zip(inputs, layers, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].flatten(0, 1).cpu()))
    read = 0
    with torch.inference_mode(), tqdm(total=calibration.tokens, desc="calibrate", unit="token") as bar:
        for row in order:
            ids = loaded.table[row]["input_ids"][: calibration.tokens - read]
            model.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            bar.update(len(ids))
            read += len(ids)
            if read == calibration.tokens:
                break
    return [torch.cat(kept) for kept in inputs]


def write(
    model: SharedCoreForCausalLM, reports: Sequence[LayerReport], source: str, output: Path, *, overwrite: bool
) -> None:
    """Write the small format beside the source's tokenizer; the folder appears under its name only when it is complete.

    Raises:
        ValueError: When the output exists, or another run is writing it.
    """
    record = {
        "package": "agri-moe " + metadata.version("agri-moe"),
        "source": source,
        "rank": model.config.shared_core_rank,
        "layers": [asdict(report) for report in reports],
    }
    with new_checkpoint(output, record, name=RECORD, overwrite=overwrite) as building:
        model.save_pretrained(building)
        copy_companions(checkpoint_folder(source), building)
        write_moe_config(building)
