"""`similarity`: how alike two checkpoints are, layer by layer, and the experts within them."""

from typing import Literal


def similarity(
    source: str,
    target: str,
    data: str | list[str],
    output: str,
    columns: dict[str, str] | None = None,
    group_by: str | None = None,
    tokens: int = 2048,
    batch_size: int = 256,
    max_length: int = 2048,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    overwrite: bool = False,
) -> None:
    """Compare two checkpoints layer by layer with torch-cka, on the thoughts and advisories of chat rows.

    Writes similarity.npz (`cka` [source layers, target layers]; for a source with experts `experts` [layers, experts,
    experts] and `expert_layers`; with group_by `load_by_group` [layers, groups, experts] and `groups`) and heat maps.
    In a run's folder, as RUN/similarity, `report` shows them.

    Example: python main.py similarity --source student --target teacher --data rows.parquet --output similarity

    Args:
        source: A run's checkpoint (.ckpt), or a Hugging Face folder or name; its layers are the rows of the matrix.
        target: The same, with the same tokenizer; its layers are the columns.
        data: Chat rows, as data.train takes them.
        output: Folder to write.
        columns: Our column -> the one in the files, e.g. {"advisory": "answer"}.
        group_by: Column, or struct.field such as scenario.crop: how the experts share each of its values out.
        tokens: Tokens that are compared, drawn from all rows; the experts, on the first 512 of them.
        batch_size: Tokens to a batch of torch-cka, at least 4.
        max_length: Longer rows are left out.
        device: Where the models run; auto takes a GPU if there is one.
        overwrite: Replace what an earlier call wrote.
    """
    from pathlib import Path

    folder = Path(output)
    if (folder / "similarity.npz").exists() and not overwrite:
        raise ValueError(f"--output {output} holds a similarity.npz; name another folder, or give --overwrite true.")
    if not 4 <= batch_size <= tokens:
        raise ValueError(f"--batch_size is {batch_size}: it must be at least 4 and at most --tokens, {tokens}.")

    import numpy as np
    import torch

    from agri_moe import similarity as comparison
    from agri_moe.models.upcycle import is_moe
    from agri_moe.pictures import draw_matrices, png

    chat = comparison.load_chat(source)
    for name, key in ((source, "--source"), (target, "--target")):
        comparison.check_model(name, key, chat)
    rows, bad = comparison.read_sample(data, chat, columns or {}, group_by, tokens, max_length)
    if bad:
        print(f"{bad:,} rows that cannot be used, or are longer than {max_length:,} tokens, were left out.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = comparison.load_model(source, "--source", chat)
    if group_by is not None and not is_moe(model.hf.config):
        raise ValueError(f"--group_by needs experts to share the rows out to, and {source} has none; leave it out.")
    experts = model.num_experts
    one = comparison.read_features(model, chat, rows, tokens, device)
    del model
    other = comparison.read_features(comparison.load_model(target, "--target", chat), chat, rows, tokens, device)

    sides = ("layer of the source", "layer of the target")
    found = {"cka": comparison.torch_cka_matrix(one.layers, other.layers, batch_size, sides)}
    pictures = {"cka": draw_matrices({"debiased linear CKA": found["cka"]}, x=sides[1], y=sides[0])}
    if one.experts:
        within = comparison.experts_within(one, batch_size)
        found |= {"experts": np.stack(list(within.values())), "expert_layers": np.array(list(within))}
        by_layer = {f"layer {number}": matrix for number, matrix in within.items()}
        pictures["experts"] = draw_matrices(by_layer, x="expert", y="expert")
    if group_by is not None:
        shares, groups = comparison.load_by_group(one, rows, experts)
        found |= {"load_by_group": shares, "groups": np.array(groups), "group_by": np.array(group_by)}
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "similarity.npz", allow_pickle=False, **found)
    for name, figure in pictures.items():
        (folder / f"{name}.png").write_bytes(png(figure))
    best = found["cka"].argmax(1)
    for layer, match in enumerate(best.tolist()):
        print(f"source layer {layer:3}: most like target layer {match:3}, CKA {found['cka'][layer, match]:.3f}")
    print(f"Wrote {folder}/similarity.npz and {', '.join(f'{name}.png' for name in pictures)}.")
