"""`export`: a checkpoint as a Hugging Face folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agri_moe.data.chat import Chat


def export(
    output: str,
    checkpoint: str | None = None,
    run_root: str = ".",
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder that plain transformers loads, and prove that it does.

    Experts with a shared core are multiplied out.

    Example: python main.py export --output advisor

    Args:
        output: Folder to write.
        checkpoint: A run's checkpoint (.ckpt), or a model folder; the newest run's newest checkpoint by default.
        run_root: Where lightning_logs lies, to find the newest run.
        dtype: Type of the weights written.
        overwrite: Replace an existing folder, once the new one is complete.
    """
    import shutil

    target = Path(output)
    if target.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; name another folder, or give --overwrite true to replace it.")

    import torch

    from agri_moe.models.replaced import is_replaced, stock_model
    from agri_moe.models.shared_core import SharedCoreForCausalLM, multiplied_out
    from agri_moe.models.upcycle import is_moe, write_moe_config
    from agri_moe.runs import newest_checkpoint
    from agri_moe.trained import load_trained

    path = checkpoint or str(newest_checkpoint(Path(run_root))[1])
    model, chat = load_trained(path, "--checkpoint")
    if isinstance(model, SharedCoreForCausalLM):
        model = multiplied_out(model)
    if is_replaced(model):
        model = stock_model(model, f"--checkpoint {path}")
    for parameter in model.parameters():  # not `model.to`, which rounds the frequencies of rotary positions too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    _set_generation(model, chat)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    model.save_pretrained(partial)
    if is_moe(model.config):
        write_moe_config(partial)
    chat.save(partial)
    prove(partial, model, chat)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    print(f"Exported {path} to {target}: {model.num_parameters():,} parameters in {dtype}, reloads with equal logits.")


def _set_generation(model: "PreTrainedModel", chat: "Chat") -> None:
    """Stop tokens stand in both configs: readers differ in which they look at."""
    for config in (model.config, model.generation_config):
        config.eos_token_id = chat.end_id
        config.pad_token_id = chat.pad_id
        config.bos_token_id = None


def prove(folder: Path, model: "PreTrainedModel", chat: "Chat") -> None:
    """Load the folder with plain transformers and compare logits and a greedy continuation.

    Raises:
        RuntimeError: If they differ; nothing is then put in place.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    prompt = torch.tensor([chat.encode_prompt("फसल: गेहूँ\nलक्षण: पत्तियाँ पीली")])
    with torch.inference_mode():
        same = torch.equal(model(prompt).logits, reloaded(prompt).logits)
        limits = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        same &= torch.equal(model.generate(prompt, **limits), reloaded.generate(prompt, **limits))
    messages = [{"role": "user", "content": "गेहूँ"}]
    text = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    same &= text == chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if not same:
        raise RuntimeError(f"{folder} does not reload to the same model; it was not put in place.")
