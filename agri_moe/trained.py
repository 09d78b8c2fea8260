"""A trained model from disk: an exported folder, or a checkpoint in a run's folder, whole or in pieces."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from agri_moe.data.chat import Chat
from agri_moe.models.checkpoint_files import is_litgpt, load_config
from agri_moe.models.routing import STATE, restore
from agri_moe.models.upcycle import fill, stored_placed, unreadable
from agri_moe.runs import damage

PREFIX = "model.hf."
"""Where the language model stands in a checkpoint's state."""


def load_trained(path: str, key: str) -> tuple[PreTrainedModel, Chat]:
    """Model, in the type it was saved in, and tokenizer with its chat format.

    Args:
        path: A Hugging Face folder or hub name, a LitGPT folder, or a checkpoint (`.ckpt`) of a run.
        key: The option that named it, for messages.

    Raises:
        ValueError: If there is no such model, the checkpoint is damaged, or the run's tokenizer is gone.
    """
    if Path(path).suffix == ".ckpt":
        return load_checkpoint(Path(path), key)
    load_config(path, key)
    return load_pretrained(path, dtype="auto").eval(), Chat.load(path)


def load_pretrained(
    source: str | Path, dtype: torch.dtype | Literal["auto"], quantization_config: Any = None, **options: Any
) -> PreTrainedModel:
    """A model from a Hugging Face folder or hub name, or from a folder that LitGPT wrote.

    Args:
        source: Folder or hub name; `load_config` has read it.
        dtype: Of the weights; `auto` is the type they are stored in.
        quantization_config: As transformers takes it.
        **options: For transformers.

    Raises:
        ValueError: If a LitGPT checkpoint is incomplete, or is to be quantized.
    """
    if not is_litgpt(source):
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if quantization_config is not None:
        raise ValueError(f"{source} is a LitGPT checkpoint, which is not quantized on the way: export it first.")
    if reason := unreadable(source):
        raise ValueError(f"{source} cannot be read, because {reason}.")
    config = load_config(source, "source")
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if dtype == "auto" else dtype, **options)
    fill(model, stored_placed(source))
    model.tie_weights()  # no_init_weights leaves a tied head untied
    if (Path(source).expanduser() / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()


def load_checkpoint(path: Path, key: str) -> tuple[PreTrainedModel, Chat]:
    """Model and chat from a checkpoint; the tokenizer lies in the run's folder beside it.

    One of a layer-wise run is the dense model with its networks replaced; one whose routers chose in another way than
    the stock model's does so here too, see `agri_moe.models.routing.restore`.
    """
    if not path.exists():
        raise ValueError(f"{key}: {path} does not exist.")
    check_intact(path, key)
    tokenizer = path.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise ValueError(
            f"{key}: {path} must lie in its run's folder, version_N/checkpoints/, beside version_N/tokenizer."
        )
    if path.is_dir():
        content = read_sharded(path, {"state_dict"})
    else:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "layerwise" in content:
        from agri_moe.models.replaced import load_replaced  # with Lightning, which takes seconds

        chat = Chat.load(str(tokenizer))
        return load_replaced(content, path, chat), chat
    config = AutoConfig.for_model(**content["hf_config"])
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name.removeprefix(PREFIX): t for name, t in content["state_dict"].items() if name.startswith(PREFIX)}
    model.tie_weights()
    model.load_state_dict(state)
    if "routing" in content:
        kept = {name.removeprefix(STATE): t for name, t in content["state_dict"].items() if name.startswith(STATE)}
        restore(model, content["routing"], kept)
    model.config.use_cache = True
    return model.eval(), Chat.load(str(tokenizer))


def check_intact(path: Path, key: str) -> None:
    """Refuse a checkpoint that is not as it was saved.

    Raises:
        ValueError: Naming `key`, the option that gave it.
    """
    if problem := damage(path):
        raise ValueError(f"{key}: {path} {problem}; use another checkpoint of the run.")


def read_sharded(path: Path, parts: set[str] | None = None) -> dict[str, Any]:
    """A sharded checkpoint, the folder that FSDP2 saves, as the dictionary that one device saves.

    Its pieces are read in this process alone and joined. torch keeps their table as a pickle, which can run code: only
    for folders whose checksums hold (`check_intact`).

    Args:
        path: The folder.
        parts: Of what the ranks saved together (`state_dict`, `optimizer_0`), what is read; None reads all of it.
    """
    content: dict[str, Any] = {}
    # As `torch.distributed.checkpoint.format_utils.dcp_to_torch_save` does, without the file in between.
    _load_state_dict(content, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(keys=parts), no_dist=True)
    optimizers = sorted(name for name in content if name.startswith("optimizer_"))
    states = [content.pop(name) for name in optimizers]
    return torch.load(path / "meta.pt", weights_only=True) | content | {"optimizer_states": states}


def check_shardable(path: Path, key: str) -> None:
    """Refuse a checkpoint of whole weights that a sharded run could not go on from.

    Raises:
        ValueError: If it lacks moments of a parameter that the run trains, as it does in the middle of a stage that
            leaves some out; or if it was saved before moments were kept by name.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for optimizer in content["optimizer_states"]:
        trained = [name for group in optimizer["param_groups"] for name in group["params"]]
        lacking = [name for name in trained if name not in optimizer["state"] or isinstance(name, int)]
        if lacking:
            raise ValueError(
                f"{key}: {path} has no optimizer state by the name of {lacking[0]}, which a sharded run needs: go on "
                "without ModelParallelStrategy, at least to the end of a stage that leaves parameters out."
            )
