"""Checkpoints that are refused before anything is read from them; that sound ones load is shown in test_two_ranks."""

import pickle
from pathlib import Path

import pytest
import torch

from agri_moe.callbacks.resume import AtomicCheckpointIO
from agri_moe.runs import mark_complete
from agri_moe.trained import check_shardable, load_checkpoint


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_of_a_folder_runs_unless_it_is_as_it_was_saved(tmp_path):
    folder = tmp_path / "checkpoints" / "step=00000001.ckpt"
    folder.mkdir(parents=True)
    (folder / "meta.pt").write_bytes(b"")
    (tmp_path / "tokenizer").mkdir()
    trapped = tmp_path / "trapped"
    for marked in (False, True):
        if marked:
            mark_complete(folder)
        (folder / ".metadata").write_bytes(pickle.dumps(Trap(trapped)))
        with pytest.raises(ValueError, match="which was not saved with it" if marked else "was not finished"):
            load_checkpoint(folder, "--model")
        with pytest.raises(ValueError, match="which was not saved with it" if marked else "was not finished"):
            AtomicCheckpointIO().load_checkpoint(folder)
        (folder / ".metadata").unlink()
    assert not trapped.exists()


@pytest.mark.parametrize("state", [{"a": {}}, {0: {}, 1: {}}])
def test_whole_weights_without_moments_by_name_cannot_be_sharded(tmp_path, state):
    names = ["a", "b"] if "a" in state else [0, 1]
    path = tmp_path / "step=00000001.ckpt"
    torch.save({"optimizer_states": [{"state": state, "param_groups": [{"params": names}]}]}, path)
    with pytest.raises(ValueError, match=f"no optimizer state by the name of {names[-1] if 'a' in state else 0}"):
        check_shardable(path, "--resume")
