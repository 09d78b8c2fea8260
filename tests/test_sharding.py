"""Models in pieces: the same values as whole ones, on real ranks (two processes) and on as many as a large job has."""

import math
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from agri_moe.data.chat import Chat
from agri_moe.generation import sample
from agri_moe.models.causal import CausalModel, Reads
from agri_moe.models.sharding import place, shard, shard_frozen
from agri_moe.models.shared_core import Wrapper, shared_core_config
from agri_moe.models.source import ModelConfig
from agri_moe.models.upcycle import UpcycleSpec, upcycle
from agri_moe.teacher import OnlineTeacher

CPU = torch.device("cpu")
SPEC = UpcycleSpec(num_experts=4, num_experts_per_tok=2, jitter=0.1, drop_ratio=0.25)


def in_processes(function: Callable[..., None], *args: Any, processes: int = 1) -> None:
    """Run `function(rank, *args)` in processes of their own; what one raises is raised here.

    They are forked from a server that has imported everything and computed nothing: of a process that has, torch's
    threads would be missing in the child.
    """
    multiprocessing.set_forkserver_preload(["agri_moe.models.distill", "agri_moe.generation"])
    torch.multiprocessing.start_processes(function, args, nprocs=processes, start_method="forkserver")


def on_ranks(check: Callable[..., None], tokenizer: Path, *args: Any, ranks: int = 2) -> None:
    """Run `check(mesh, chat, *args)` in processes that form a group."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    in_processes(_rank, check, tokenizer, args, ranks, port, processes=ranks)


def _rank(rank: int, check: Callable[..., None], tokenizer: Path, args: tuple[Any, ...], ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    check(init_device_mesh("cpu", (ranks,)), Chat.load(str(tokenizer)), *args)
    dist.destroy_process_group()


def in_pieces(config: ModelConfig, chat: Chat, mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> CausalModel:
    pieces = config.in_pieces("model", chat, dtype)
    assert pieces is not None
    hf = pieces.shape()
    assert all(p.device.type == "meta" for p in hf.parameters())
    model = CausalModel(hf)
    shard(model, mesh, None)
    pieces.fill(hf, CPU)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same(pieces: PreTrainedModel, expected: PreTrainedModel) -> None:
    theirs = dict(pieces.named_parameters())
    assert theirs.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(whole(theirs[name]), parameter), name
        assert theirs[name].dtype == parameter.dtype
    buffers = dict(pieces.named_buffers())
    for name, buffer in expected.named_buffers():
        assert torch.equal(buffers[name], buffer), name


# ---------------------------------------------------------------------- two real ranks


@pytest.mark.parametrize("ranks", [2, 3])  # with 3, no dimension can be cut evenly
def test_pieces_are_those_of_the_whole_model(corpus: Path, chat: Chat, dense: Path, tmp_path: Path, ranks: int) -> None:
    upcycle(dense, tmp_path / "moe", SPEC)
    untied = {"tie_word_embeddings": False, "vocab_size": len(chat.tokenizer) - 2}  # no rows for all markers
    mistral = AutoConfig.for_model(
        "mistral", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **untied,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(mistral).save_pretrained(tmp_path / "mistral")
    core = AutoModelForCausalLM.from_config(shared_core_config(AutoConfig.from_pretrained(tmp_path / "moe"), rank=8))
    for wrapper in (module for module in core.modules() if isinstance(module, Wrapper)):
        torch.nn.init.normal_(wrapper.up, std=0.1)
    core.save_pretrained(tmp_path / "core")
    on_ranks(_check_sources, corpus / "tokenizer", dense, tmp_path, ranks=ranks)


def _check_sources(mesh: DeviceMesh, chat: Chat, dense: Path, folder: Path) -> None:
    for config in (
        ModelConfig(str(dense), upcycle=SPEC),
        ModelConfig(str(dense)),
        ModelConfig(str(folder / "moe")),
        ModelConfig(str(folder / "core")),
    ):
        model = in_pieces(config, chat, mesh)
        assert_same(model.hf, config.load("model", chat))
        assert model.hf.lm_head.weight is model.hf.model.embed_tokens.weight, "tied"
        assert len(model.hf.lm_head.weight.to_local()) <= math.ceil(model.hf.config.vocab_size / mesh.size())
        _check_gradients(model, CausalModel(config.load("model", chat)))
    mixtral = ModelConfig(str(folder / "mistral"), upcycle=SPEC)
    model, expected = in_pieces(mixtral, chat, mesh), mixtral.load("model", chat)
    stored = mixtral.hf_config("model", chat).vocab_size
    assert model.hf.config.vocab_size == expected.config.vocab_size > stored, "grown for the markers"
    for name, parameter in expected.named_parameters():
        rows = whole(model.hf.get_parameter(name))
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(rows, parameter), name
            continue
        assert torch.equal(rows[:stored], parameter[:stored])
        new = sorted(token for token in chat.new_marker_pieces if token >= stored)
        assert torch.equal(rows[new], parameter[new]), "markers start as the mean of their pieces"
        assert 0.5 < rows[stored:].std() / parameter[stored:].std() < 2, "and what fills up is drawn alike"


def _check_gradients(model: CausalModel, expected: CausalModel) -> None:
    """Every rank sees the same tokens, so that the mean over ranks is what one of them would have."""
    batch = {"input_ids": torch.arange(40).view(2, 20), "position_ids": torch.arange(20).expand(2, 20)}
    for one in (model, expected):
        read = one(batch, torch.arange(40), lambda hidden, head: (hidden @ head.T).float().logsumexp(-1).sum()).read
        read.backward()
    for name, parameter in expected.hf.named_parameters():
        gradient = model.hf.get_parameter(name).grad
        assert gradient is not None, name
        assert parameter.grad is not None, name
        torch.testing.assert_close(whole(gradient), parameter.grad, rtol=1e-3, atol=1e-5)


def test_a_config_is_drawn_in_pieces(corpus: Path, dense: Path) -> None:
    options = AutoConfig.from_pretrained(dense).to_dict() | {"num_hidden_layers": 1, "initializer_range": 0.5}
    kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "initializer_range")
    on_ranks(_check_drawn, corpus / "tokenizer", ModelConfig(config={key: options[key] for key in kept}))


def _check_drawn(mesh: DeviceMesh, chat: Chat, config: ModelConfig) -> None:
    torch.manual_seed(0)
    hf = in_pieces(config, chat, mesh).hf
    expected = config.load("model", chat)
    for name, parameter in expected.named_parameters():
        drawn = whole(hf.get_parameter(name))
        torch.testing.assert_close(drawn.std(), parameter.std(), rtol=0.1, atol=0)
        assert "norm" in name or len(drawn.unique()) > 0.9 * drawn.numel(), "no piece is another's copy"


def test_a_frozen_model_in_pieces_answers_as_a_whole_one(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(tmp_path / "untied")
    on_ranks(_check_frozen, corpus / "tokenizer", [str(teacher), str(tmp_path / "untied")])


def _check_frozen(mesh: DeviceMesh, chat: Chat, sources: list[str]) -> None:
    ids = torch.arange(40).view(2, 20) * (1 + mesh.get_local_rank())  # each rank asks of its own batch
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(20).expand(2, 20),
        "teacher_sample": torch.arange(7),
        "teacher_positions": torch.arange(3, 30),
    }
    for source in sources:
        for dtype in (torch.float32, torch.bfloat16):
            config = ModelConfig(source)
            pieces = config.in_pieces("model.teacher", chat, dtype)
            assert pieces is not None
            hf = pieces.shape()
            frozen = OnlineTeacher(CausalModel(hf))
            shard_frozen(frozen.model, mesh)
            pieces.fill(hf, CPU)
            _compare_answers(
                frozen, OnlineTeacher(CausalModel(config.load("model.teacher", chat, dtype))), batch, [0, 3]
            )
            held = [p for p in hf.parameters() if not isinstance(p, DTensor)]
            assert held == [hf.lm_head.weight], "the head alone is whole"
            assert not any(p.requires_grad for p in hf.parameters())


def test_what_cannot_be_read_in_pieces_is_read_whole_and_said(corpus: Path, chat: Chat, tmp_path: Path) -> None:
    options = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_experts": 4}
    config = AutoConfig.for_model(
        "qwen2_moe", **options, shared_expert_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128 * (1 + len(chat.tokenizer) // 128),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    on_ranks(_check_whole, corpus / "tokenizer", str(tmp_path))


def _check_whole(mesh: DeviceMesh, chat: Chat, source: str) -> None:
    config = ModelConfig(source)
    with pytest.warns(UserWarning, match=r"model\.teacher: .* it has no tensor .*experts\.gate_up_proj"):
        assert config.in_pieces("model.teacher", chat) is None
    frozen = OnlineTeacher(CausalModel(config.load("model.teacher", chat)))
    shard_frozen(frozen.model, mesh)
    batch = {
        "input_ids": torch.arange(20)[None],
        "position_ids": torch.arange(20)[None],
        "teacher_sample": torch.arange(7),
        "teacher_positions": torch.arange(9),
    }
    _compare_answers(frozen, OnlineTeacher(CausalModel(config.load("model.teacher", chat))), batch, layers=[1])


def _compare_answers(
    frozen: OnlineTeacher, expected: OnlineTeacher, batch: dict[str, torch.Tensor], layers: list[int]
) -> None:
    for _ in range(2):  # the second time from resharded parameters
        got, wanted = (model.signal(batch, Reads(layers=layers)) for model in (frozen, expected))
        assert torch.equal(got.head_VD, wanted.head_VD)
        assert torch.equal(got.hidden_MD, wanted.hidden_MD)
        assert all(torch.equal(got.layers[i], wanted.layers[i]) for i in layers)


def test_ranks_write_together_what_one_writes(corpus: Path, dense: Path) -> None:
    on_ranks(_check_generation, corpus / "tokenizer", ModelConfig(str(dense), upcycle=SPEC))


def _check_generation(mesh: DeviceMesh, chat: Chat, config: ModelConfig) -> None:
    prompts = [chat.encode_prompt(text) for text in ("धान", "गेहूँ में पीला रतुआ", "The leaves turn yellow")]
    own = prompts[mesh.get_local_rank() :]
    expected = config.load("model", chat).eval()
    options = {"pad_id": chat.pad_id, "batch_size": 3, "do_sample": False, "max_new_tokens": 6}
    (first, *_), *_ = sample(expected, own, end_ids=[], **options)
    ends = [first] if mesh.get_local_rank() else []  # the second rank has nothing to say, and must not stop the first
    model = in_pieces(config, chat, mesh).eval()
    for _ in range(2):
        assert list(sample(model, own, end_ids=ends, **options)) == list(sample(expected, own, end_ids=ends, **options))


# ---------------------------------------------------------------------- the ranks of a large job


@pytest.mark.parametrize("ranks", [3, 16, 64])
def test_no_rank_is_without_its_share_of_the_experts(ranks: int) -> None:
    in_processes(_check_shares, ranks)


def _check_shares(_: int, ranks: int) -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=1024, moe_intermediate_size=3072, intermediate_size=3072, num_hidden_layers=1,
        num_experts=8, num_attention_heads=16, num_key_value_heads=8, head_dim=128, vocab_size=151_936,
    )  # fmt: skip
    for rank in (0, ranks - 1):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        with torch.device("meta"):
            model = CausalModel(AutoModelForCausalLM.from_config(config))
        shard(model, init_device_mesh("cpu", (ranks,)), None)
        experts = model.hf.model.layers[0].mlp.experts
        for parameter in (experts.gate_up_proj, experts.down_proj):
            assert parameter.to_local().numel() == parameter.numel() // ranks
        dist.destroy_process_group()


def test_place_writes_every_piece_of_what_it_is_given() -> None:
    in_processes(_check_place)


def _check_place(_: int) -> None:
    expected = torch.zeros(4, 12, 5)
    values = torch.arange(1.0, 36).view(7, 5)
    expected[2, 3:10] = values
    for dim, ranks in ((0, 3), (1, 3), (1, 5), (2, 2), (0, 8)):
        pieces = []
        for rank in range(ranks):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
            mesh = init_device_mesh("cpu", (ranks,))
            chunks = torch.zeros_like(expected).chunk(ranks, dim)
            piece = chunks[rank] if rank < len(chunks) else chunks[0].narrow(dim, 0, 0)
            parameter = DTensor.from_local(
                piece, mesh, [Shard(dim)], run_check=False, shape=expected.shape, stride=expected.stride()
            )
            place(parameter, values, (2, 3, 0))
            pieces.append(parameter.to_local())
            dist.destroy_process_group()
        assert torch.equal(torch.cat(pieces, dim), expected), (dim, ranks)
