"""`python main.py upcycle`: a dense checkpoint becomes a Mixture-of-Experts checkpoint."""

from __future__ import annotations


def upcycle(
    source: str,
    output: str,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    jitter: float = 0.01,
    drop_ratio: float = 0.0,
    granularity: int = 1,
    router_std: float = 0.02,
    seed: int = 0,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a dense checkpoint (Qwen3, Llama, Mistral) into a Mixture-of-Experts checkpoint.

    Streams layer by layer, so a model larger than memory is no obstacle; started again after an interruption,
    it goes on where it stopped.

    Example: python main.py upcycle --source DENSE --output DIR

    Args:
        source: Dense checkpoint in safetensors: a folder or a Hugging Face name.
        output: Folder to write; it must not exist, unless overwrite is given.
        num_experts: Experts per layer, slices included.
        num_experts_per_tok: Experts that each token visits.
        jitter: Noise on each expert, as a share of the weight's own standard deviation. At 0 the experts are
            identical and the router gets no gradient from the language-model loss.
        drop_ratio: Share of each expert's intermediate dimensions drawn anew (Drop-Upcycling).
        granularity: Slices per FFN; num_experts and num_experts_per_tok are multiples of it.
        router_std: Standard deviation of the router's weights.
        seed: Seed of router, jitter and drop; the same seed gives the same bytes.
        tokenizer: Folder that `tokens` wrote from the source's tokenizer: each new piece gets a row of embedding and
            head, made of those of what it is made of. By default the source's own.
        overwrite: Replace an existing model folder, once the new one is complete.
    """
    from pathlib import Path

    from agri_moe.data.chat import Chat
    from agri_moe.models.checkpoint_files import load_config
    from agri_moe.models.source import check_vocabulary, untrained_tokens
    from agri_moe.models.upcycle import UpcycleSpec, count_parameters
    from agri_moe.models.upcycle import upcycle as write_upcycled

    spec = UpcycleSpec(num_experts, num_experts_per_tok, jitter, drop_ratio, granularity, router_std, seed)
    if tokenizer is None:
        write_upcycled(source, output, spec, overwrite=overwrite)
    else:
        chat = Chat.load(tokenizer)
        check_vocabulary(source, load_config(source, "source"), chat, "source")
        new_rows = untrained_tokens(source, chat)
        write_upcycled(
            source,
            output,
            spec,
            new_rows=new_rows,
            merged=chat.merged,
            save_tokenizer=chat.save,
            overwrite=overwrite,
        )
        print(f"{len(new_rows):,} new rows of embedding and head, made of those of what their tokens are made of.")
    total, active = count_parameters(load_config(Path(output).expanduser(), "output"))
    print(f"{output}: {total:,} parameters, {active:,} of them active per token.")
    print(f"Next: python main.py audit --student {output}")
