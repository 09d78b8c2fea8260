"""`export`: a checkpoint as a folder that other tools load."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from agri_moe.data.chat import Chat
    from agri_moe.reporting import Record

PROVENANCE = "export.json"
NEW_TOKENS = 512
"""How long an answer may become where nobody says, and the run did not: transformers would stop after 20."""


def export(
    output: str,
    checkpoint: str | None = None,
    run_root: str = ".",
    format: Literal["huggingface", "litgpt"] = "huggingface",
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    license: str | None = None,
    drop_router_bias: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder with a model card, and prove that plain transformers loads it.

    Experts with a shared core are multiplied out.

    Example: python main.py export --output advisor

    Args:
        output: Folder to write.
        checkpoint: A run's checkpoint (.ckpt), or a model folder; the newest run's newest checkpoint by default.
        run_root: Where lightning_logs lies, to find the newest run.
        format: `huggingface`, or `litgpt` for lit_model.pth with model_config.yaml.
        dtype: Type of the weights written.
        license: Licence for the model card, by its identifier on the hub (apache-2.0); none is stated by default.
        drop_router_bias: Leave out the biases that `model.routing.bias_update_rate` has trained, for which stock
            routers have no place: some experts are then chosen otherwise than in training, and it is said how many.
        overwrite: Replace an existing model folder, once the new one is complete.
    """
    target = Path(output)
    if target.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; name another folder, or give --overwrite true to replace it.")
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise ValueError(f"--license {license} is no identifier of the hub: give one such as apache-2.0 or cc-by-4.0.")

    from agri_moe.model_card import model_card
    from agri_moe.models.checkpoint_files import new_checkpoint, refuse_output
    from agri_moe.runs import newest_checkpoint, replace_text

    refuse_output(target, overwrite)
    path = checkpoint or str(newest_checkpoint(Path(run_root))[1])
    model, chat, note = load_stock(path, dtype, drop_router_bias)
    record, step = _record(Path(path))
    _set_generation(model, chat, record)
    library = "litgpt" if format == "litgpt" else "transformers"
    card = model_card(target.name, path, record, step, chat, model.config, license, library)
    if note:
        card = f"{card.rstrip()}\n\n## Routing\n\n{note}\n"
    with new_checkpoint(target, _provenance(path, format, dtype), overwrite=overwrite, name=PROVENANCE) as building:
        replace_text(building / "README.md", card)
        chat.save(building)
        if format == "litgpt":
            _write_litgpt(building, target.name, model, chat, f"--checkpoint {path}")
        else:
            _write_huggingface(building, model)
            prove(building, model, chat)
    if note:
        print(note)
    print(f"Exported {path} to {target}: {model.num_parameters():,} parameters in {dtype}, reloads with equal logits.")


def load_stock(path: str, dtype: str, drop_router_bias: bool = False) -> "tuple[PreTrainedModel, Chat, str | None]":
    """The model as transformers knows it, with weights of one type; its chat; and what it has lost, if anything.

    Raises:
        ValueError: If no stock model can hold it.
    """
    import torch

    from agri_moe.models.replaced import is_replaced, stock_model
    from agri_moe.models.shared_core import SharedCoreForCausalLM, multiplied_out
    from agri_moe.trained import load_trained

    model, chat = load_trained(path, "--checkpoint")
    note = _without_routing(model, chat, f"--checkpoint {path}", drop_router_bias)
    if isinstance(model, SharedCoreForCausalLM):
        model = multiplied_out(model)
    if is_replaced(model):
        model = stock_model(model, f"--checkpoint {path}")
    for parameter in model.parameters():  # not `model.to`, which rounds the frequencies of rotary positions too
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    return model, chat, note


def _without_routing(model: "PreTrainedModel", chat: "Chat", key: str, drop_router_bias: bool) -> str | None:
    """Leave the routers to the stock model, in place, where that is allowed; a sentence on what this changes."""
    import torch

    from agri_moe.models.routing import kept_routing, leave_out_bias

    kind = kept_routing(model)
    if kind == "expert_choice":
        raise ValueError(
            f"{key}: the experts choose their tokens, and no stock model has that: train with model.routing.kind: "
            "token_choice, or use the checkpoint through this package (generate --model CHECKPOINT)."
        )
    if kind is None:
        return None
    if not drop_router_bias:
        raise ValueError(
            f"{key}: its routers choose by a bias, for which stock routers have no place: train its last steps with "
            "model.routing.bias_anneal_steps, or give --drop_router_bias true and let some choices change."
        )
    probe = torch.tensor([chat.encode_prompt(PROBE)])
    changed = leave_out_bias(model, probe)
    return (
        f"The routers' biases were left out: {changed:.1%} of the choices of experts on a probe of {probe.numel()} "
        "tokens are others than in training."
    )


def _record(checkpoint: Path) -> "tuple[Record | None, int | None]":
    """What the checkpoint's run left, and the checkpoint's step; None of a model that is no run's checkpoint."""
    from agri_moe.reporting import read_record
    from agri_moe.runs import step_of

    folder = checkpoint.parent.parent
    if checkpoint.suffix != ".ckpt" or not (folder / "config.yaml").is_file():
        return None, None
    return read_record(folder), step_of(checkpoint)


def _provenance(checkpoint: str, format: str, dtype: str) -> dict[str, Any]:
    from importlib import metadata

    return {
        "package": "agri-moe " + metadata.version("agri-moe"),
        "checkpoint": checkpoint,
        "format": format,
        "dtype": dtype,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _set_generation(model: "PreTrainedModel", chat: "Chat", record: "Record | None") -> None:
    """Stop tokens stand in both configs: readers differ in which they look at.

    Nothing else of the generation config is kept: how a source sampled, and that a run trained without a cache, are
    no part of the trained model.
    """
    from transformers import GenerationConfig

    tokens = {"eos_token_id": chat.end_id, "pad_token_id": chat.pad_id, "bos_token_id": None}
    model.config.update(tokens)
    model.config.use_cache = True
    longest = (record.setting("model.max_new_tokens") if record else None) or NEW_TOKENS
    model.generation_config = GenerationConfig(**tokens, do_sample=False, max_new_tokens=longest)


def _write_huggingface(folder: Path, model: "PreTrainedModel") -> None:
    from agri_moe.models.upcycle import is_moe, write_moe_config

    model.save_pretrained(folder)
    if is_moe(model.config):
        write_moe_config(folder)


def _write_litgpt(folder: Path, name: str, model: "PreTrainedModel", chat: "Chat", key: str) -> None:
    """Write LitGPT's two files and what its tokenizer reads; the proof is that they come in again.

    Raises:
        ValueError: If LitGPT has no such model.
        RuntimeError: If they come in as another model.
    """
    import torch

    from agri_moe.models import litgpt
    from agri_moe.models.upcycle import stored_parts
    from agri_moe.trained import load_pretrained

    settings = litgpt.settings_for(model.config, name, len(chat.tokenizer), key)
    litgpt.write(folder, stored_parts(model), model.config, settings)
    model.generation_config.save_pretrained(folder)
    prompt = torch.tensor([chat.encode_prompt(PROBE)])
    with torch.inference_mode():
        same = torch.equal(load_pretrained(folder, "auto")(prompt).logits, model(prompt).logits)
    if not same:
        raise RuntimeError(f"{folder} does not come in as the same model; it was not put in place.")


PROBE = "फसल: गेहूँ\nलक्षण: पत्तियाँ पीली"


def prove(folder: Path, model: "PreTrainedModel", chat: "Chat") -> None:
    """Have another process load the folder with plain transformers: prompt, logits and a greedy answer must be equal.

    Raises:
        RuntimeError: If they are not; nothing is then put in place.
    """
    import json
    import subprocess
    import sys
    from tempfile import TemporaryDirectory

    import torch
    from safetensors.torch import save_file

    prompt = torch.tensor([chat.encode_prompt(PROBE)])
    limits = {"max_new_tokens": 16}
    with torch.inference_mode():
        logits = model(prompt).logits
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), **limits)
    facts = {
        "messages": [{"role": "user", "content": PROBE}],
        "limits": limits,
        "threads": torch.get_num_threads(),
    }
    with TemporaryDirectory() as temporary:
        expected = Path(temporary) / "expected.safetensors"
        save_file({"prompt": prompt, "logits": logits, "written": written}, expected, {"facts": json.dumps(facts)})
        # -P: no folder of ours is searched for modules.
        program = [sys.executable, "-P", str(Path(__file__).parents[1] / "reload_check.py")]
        result = subprocess.run([*program, str(folder), str(expected)], capture_output=True, text=True, check=False)
    if result.returncode:
        reasons = "; ".join((result.stdout.strip() or result.stderr.strip().rpartition("\n")[2]).splitlines())
        raise RuntimeError(f"{folder} does not reload to the same model ({reasons}); it was not put in place.")
