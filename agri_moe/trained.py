"""A trained model from disk, ready to answer: an exported folder, or a checkpoint in a run's folder."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from agri_moe.data.chat import Chat
from agri_moe.models.checkpoint_files import load_config
from agri_moe.runs import damage

PREFIX = "model.hf."
"""Where the language model stands in a checkpoint's state."""


def load_trained(path: str, key: str) -> tuple[PreTrainedModel, Chat]:
    """Model, in the type it was saved in, and tokenizer with its chat format.

    Args:
        path: A Hugging Face folder or hub name, or a checkpoint (`.ckpt`) of a run.
        key: The option that named it, for messages.

    Raises:
        ValueError: If there is no such model, the checkpoint is damaged, or the run's tokenizer is gone.
    """
    if Path(path).suffix == ".ckpt":
        return load_checkpoint(Path(path), key)
    load_config(path, key)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.eval(), Chat.load(path)


def load_checkpoint(path: Path, key: str) -> tuple[PreTrainedModel, Chat]:
    """Model and chat from a checkpoint; the tokenizer lies in the run's folder beside it."""
    if path.is_dir():
        raise ValueError(f"{key}: {path} is a sharded checkpoint, which export and generate do not read.")
    if not path.is_file():
        raise ValueError(f"{key}: {path} does not exist.")
    if problem := damage(path):
        raise ValueError(f"{key}: {path} {problem}; use another checkpoint of the run.")
    tokenizer = path.parent.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise ValueError(
            f"{key}: {path} must lie in its run's folder, version_N/checkpoints/, beside version_N/tokenizer."
        )
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    config = AutoConfig.for_model(**content["hf_config"])
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name.removeprefix(PREFIX): t for name, t in content["state_dict"].items() if name.startswith(PREFIX)}
    model.tie_weights()
    model.load_state_dict(state)
    model.config.use_cache = True
    return model.eval(), Chat.load(str(tokenizer))
