"""No file runs code, leads out of its folder, or makes anything be fetched. Every hostile file here is a real one."""

import ast
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.checkpoint import save

from agri_moe.callbacks.resume import AtomicCheckpointIO
from agri_moe.cli import main
from agri_moe.data.chat import Chat
from agri_moe.data.logit_cache import MANIFEST, LogitCache
from agri_moe.foreign_files import check_found_config, check_sharded
from agri_moe.models.checkpoint_files import load_config, stored_tensors
from agri_moe.runs import mark_complete, new_run
from agri_moe.trained import load_checkpoint, load_trained

ROOT = Path(__file__).parents[1]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A folder that must not come into being."""
    return tmp_path / "canary"


# ---------------------------------------------------------------------- the package itself


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call in a file, by the name that is called."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", sorted((ROOT / "agri_moe").rglob("*.py")), ids=lambda path: path.name)
def test_the_package_calls_nothing_that_runs_what_it_reads(path: Path) -> None:
    for name, call in calls(ast.parse(path.read_text("utf-8"))):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{path}:{call.lineno}: {ast.unparse(call)}"
        if name.endswith("torch.load"):
            assert given.get("weights_only") == "True", where
        if name in (
            "AutoConfig.from_pretrained",
            "AutoTokenizer.from_pretrained",
            "AutoModelForCausalLM.from_pretrained",
        ):
            assert given.get("trust_remote_code") == "False", where
        if name.endswith("np.load"):
            assert given.get("allow_pickle", "False") == "False", where
        assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"), where
        assert name not in ("os.system", "os.popen", "joblib.load", "torch.hub.load", "__import__"), where
        assert given.get("shell", "False") == "False", where


# ---------------------------------------------------------------------- checkpoints


def test_a_pickle_as_a_checkpoint_is_refused_by_name(tmp_path: Path, canary: Path, chat: Any) -> None:
    """With checksums that are right; in a folder that is a run's."""
    run = new_run(tmp_path, "mark")
    (run.folder / "checkpoints").mkdir()
    chat.save(run.folder / "tokenizer")
    for content in ({"state_dict": Evil(canary)}, pickle.dumps(Evil(canary)), b"", b"PK\3\4nonsense"):
        path = run.folder / "checkpoints" / "step=00000001.ckpt"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        mark_complete(path)
        with pytest.raises(ValueError, match=r"--model: \S+step=00000001.ckpt is not loaded, .*could run code"):
            load_trained(str(path), "--model")
        with pytest.raises(ValueError, match=r"--ckpt_path: \S+step=00000001.ckpt is not loaded"):
            AtomicCheckpointIO().load_checkpoint(path)
    assert not canary.exists()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A small sharded checkpoint, as torch writes it."""
    folder = tmp_path / "run" / "checkpoints" / "step=00000001.ckpt"
    state = {"state_dict": {"weight": torch.ones(3)}, "optimizer_0": {"lr": 0.1, "betas": (0.9, 0.95)}}
    with pytest.warns(UserWarning, match="single process"):
        save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 0}, folder / "meta.pt")
    check_sharded(folder, "--model")
    return folder


def edit(folder: Path, change: Any) -> None:
    """Change the table of a sharded checkpoint."""
    table = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(table) or table))


def evil_piece(folder: Path, canary: Path) -> None:
    """What is no tensor runs code: torch reads it without `weights_only`."""
    table = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next((index, info) for index, info in table.storage_data.items() if index.fqn.endswith("lr"))
    piece = folder / "__9_0.distcp"
    torch.save(Evil(canary), piece)
    info.relative_path, info.offset, info.length = piece.name, 0, piece.stat().st_size
    table.storage_data[index] = info
    (folder / ".metadata").write_bytes(pickle.dumps(table))


def outside(folder: Path, name: str) -> None:
    """A piece that lies elsewhere."""

    def change(table: Any) -> None:
        for info in table.storage_data.values():
            info.relative_path = name

    edit(folder, change)


def link(folder: Path) -> None:
    """A piece that is a link to elsewhere."""
    piece = folder / "__0_0.distcp"
    piece.rename(folder.parent / "elsewhere")
    piece.symlink_to(folder.parent / "elsewhere")


HOSTILE_FOLDERS: dict[str, Any] = {
    "a pickle for a table": lambda folder, canary: (folder / ".metadata").write_bytes(pickle.dumps(Evil(canary))),
    "a table and then code": lambda folder, canary: edit(folder, lambda table: [table, Evil(canary)]),
    "code in the planner's data": lambda folder, canary: edit(
        folder, lambda table: setattr(table, "planner_data", Evil(canary))
    ),
    "a class reached through another": lambda folder, canary: (folder / ".metadata").write_bytes(
        b"\x80\x04\x8c\x05torch\x8c\x0dSize.__class__\x93."
    ),
    "code beside the tensors": evil_piece,
    "code in meta.pt": lambda folder, canary: torch.save(Evil(canary), folder / "meta.pt"),
    "a piece above the folder": lambda folder, canary: outside(folder, "../../secret.distcp"),
    "a piece anywhere": lambda folder, canary: outside(folder, "/etc/passwd"),
    "a piece that is a link": lambda folder, canary: link(folder),
    "a table of another kind": lambda folder, canary: edit(folder, lambda table: {"weight": 1}),
    "a table that takes memory": lambda folder, canary: (folder / ".metadata").write_bytes(
        b"\x80\x04Nr\xff\xff\xff\x7f."  # None, kept as number 2,147,483,647
    ),
    "a damaged table": lambda folder, canary: (folder / ".metadata").write_bytes(b"\x80\x04nonsense"),
    "no table": lambda folder, canary: (folder / ".metadata").unlink(),
}


@pytest.mark.parametrize("how", HOSTILE_FOLDERS)
def test_a_hostile_sharded_checkpoint_is_refused_by_name(how: str, sharded: Path, canary: Path, chat: Any) -> None:
    """With checksums that are right."""
    HOSTILE_FOLDERS[how](sharded, canary)
    mark_complete(sharded)
    chat.save(sharded.parents[1] / "tokenizer")
    for load in (
        lambda: check_sharded(sharded, "--model"),
        lambda: load_checkpoint(sharded, "--model"),
        lambda: AtomicCheckpointIO().load_checkpoint(sharded),
    ):
        with pytest.raises(ValueError, match=r"step=00000001.ckpt (is not loaded|lacks|holds)"):
            load()
    assert not canary.exists()


# ---------------------------------------------------------------------- model folders and caches


def hostile_model(dense: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other settings."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in dense.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def code(folder: Path, canary: Path) -> None:
    """A module beside the weights that auto_map names."""
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass C: ...\nclass M: ...\nclass T: ...\n")


def test_code_beside_weights_is_never_run(dense: Path, tmp_path: Path, canary: Path) -> None:
    """For a known model type it is passed over; where nothing else could read the model it is refused."""
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    folder = hostile_model(dense, tmp_path, auto_map=auto_map)
    code(folder, canary)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    load_trained(str(folder), "--model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"--model: \S+ is no folder or hub name with a model in it .*custom code"):
        load_trained(str(folder), "--model")
    assert not canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_is_not_fetched(key: str, dense: Path, tmp_path: Path) -> None:
    folder = hostile_model(dense, tmp_path, **{key: "someone/kernel"})
    with pytest.raises(ValueError, match="attention kernel someone/kernel, which is code from the hub"):
        load_trained(str(folder), "--model")


def test_a_kernel_named_in_a_checkpoint_is_not_fetched(tmp_path: Path, chat: Any) -> None:
    run = new_run(tmp_path, "mark")
    path = run.folder / "checkpoints" / "step=00000001.ckpt"
    path.parent.mkdir()
    chat.save(run.folder / "tokenizer")
    torch.save({"hf_config": {"model_type": "qwen3", "attn_implementation": "someone/kernel"}, "state_dict": {}}, path)
    mark_complete(path)
    with pytest.raises(ValueError, match="attention kernel someone/kernel"):
        load_trained(str(path), "--model")


def test_pickled_weights_run_nothing(dense: Path, tmp_path: Path, canary: Path) -> None:
    folder = hostile_model(dense, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil(canary)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin, whose format can run code"):
        stored_tensors(folder)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_trained(str(folder), "--model")
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "sub/../../model.safetensors", 3])
def test_an_index_names_nothing_outside_its_folder(name: Any, dense: Path, tmp_path: Path) -> None:
    folder = hostile_model(dense, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (stored_tensors, lambda folder: load_config(folder, "--model")):
        with pytest.raises(ValueError, match=r"index.json names .*, which is no file of a checkpoint"):
            read(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"system": 5}', '{"evil": "x"}', '{"user": "a", "system": "a"}'])
def test_a_hostile_chat_format_is_refused_in_one_sentence(content: str, chat: Any, tmp_path: Path) -> None:
    chat.save(tmp_path)
    (tmp_path / "chat_format.json").write_text(content)
    with pytest.raises(ValueError, match=r"chat_format.json|format: two markers"):
        Chat.load(str(tmp_path))


def test_markers_cannot_break_out_of_the_template(corpus: Path) -> None:
    """A saved format may name any markers: in the template they stay text."""
    from agri_moe.data.chat import ChatFormat

    for marker in (
        "-}}{{ 7 * 7 }}{{-",
        "%}{% set x = 1 %}",
        "'+raise_exception('x')+'",
        "\\' ~ 7 * 7 ~ \\'",
        "{# x #}",
    ):
        chat = Chat.load(str(corpus / "tokenizer"), ChatFormat(system=marker, scenario_header="{{ x }} %} '"))
        row = {"scenario": "a", "advisory": "b"}
        assert chat.tokenizer.apply_chat_template(chat.messages(row), tokenize=False) == chat.render(row)


def test_a_cache_manifest_is_json_and_names_files_of_its_own(tmp_path: Path, canary: Path) -> None:
    fields = {"kind": "topk", "tokens": 5, "seed": 0, "vocabulary": 40, "segments": ["assistant"], "view": "same"}
    fields |= dict.fromkeys(("teacher", "teacher_source", "dtype", "tokenizer", "template", "rows"), "x")
    fields["format"] = 1
    secret = tmp_path / "secret.arrow"
    secret.write_bytes(b"secret")
    told = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    folder = tmp_path / "cache"
    folder.mkdir()
    for content, message in (
        (pickle.dumps(Evil(canary)), "cannot be read"),
        ({"files": {"../secret.arrow": told}}, "names '../secret.arrow', which is no file of a cache"),
        ({"files": {str(secret): told}}, "which is no file of a cache"),
        ({"files": {"tokenizer/../../secret.arrow": told}}, "which is no file of a cache"),
        ({"files": {}, "kind": "evil"}, "names the kind evil"),
        ({"files": {}, "tokens": 1e9}, "says tokens 1000000000.0"),
    ):
        text = content if isinstance(content, bytes) else json.dumps(fields | content).encode()
        (folder / MANIFEST).write_bytes(text)
        with pytest.raises(ValueError, match=message):
            LogitCache(folder)
    assert not canary.exists()


def test_a_shard_with_a_right_checksum_may_still_be_no_shard(tmp_path: Path) -> None:
    """Found by scripts/fuzz.py: Arrow's own errors came through."""
    from scripts.fuzz import fuzz_cache

    fuzz_cache(b"\x08" + bytes(range(0, 240)))
    fuzz_cache(b"\x09\x20\x01\x07" * 20)


# ---------------------------------------------------------------------- configs that were found


@pytest.fixture
def found(distill_config: Path, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run with a checkpoint and a changed config, and a module that leaves a trace when it is imported."""
    (tmp_path / "evil_module.py").write_text(
        f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\ndef function(*_): ...\n"
        "from agri_moe.models.pretrain import PretrainModule\nclass Mine(PretrainModule): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = new_run(tmp_path, "mark")
    path = run.folder / "checkpoints" / "step=00000001.ckpt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    mark_complete(path)

    def write(change: Any) -> Path:
        config = yaml.safe_load(distill_config.read_text())
        config["trainer"]["default_root_dir"] = str(tmp_path)
        change(config)
        run.config.write_text(yaml.safe_dump(config))
        return run.config

    return write


HOSTILE_CONFIGS: dict[str, Any] = {
    "model": lambda c: c["model"].update(class_path="evil_module.Mine"),
    "model by name": lambda c: c.update(model="evil_module.Mine"),
    "data": lambda c: c["data"].update(class_path="evil_module.Mine"),
    "callback": lambda c: c["trainer"]["callbacks"].append({"class_path": "evil_module.Mine"}),
    "callback by name": lambda c: c["trainer"].update(callbacks=["evil_module.Mine"]),
    "logger": lambda c: c["trainer"].update(logger="evil_module.Mine"),
    "a dataclass": lambda c: c["model"]["init_args"].update(objective="evil_module.Mine"),
    "deep in the objective": lambda c: c["model"]["init_args"].update(objective={"kl": {"weight": "evil_module.Mine"}}),
    "a path that is no text": lambda c: c["data"]["init_args"].update(train={"class_path": "evil_module.Mine"}),
    "a function": lambda c: c["trainer"]["callbacks"].append(
        {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"on_fit_start": "evil_module.function"},
        }
    ),
    "a function through a trusted module": lambda c: c["trainer"]["callbacks"].append(
        {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "agri_moe.runs.os.system"}}
    ),
    "what a trusted module imports": lambda c: c["model"].update(class_path="agri_moe.runs.Thread.__init__"),
    "another config": lambda c: c.update(config="evil.yaml"),
    # What jsonargparse reads out of a text, or out of the file of that name.
    "a model written as text": lambda c: c.update(model=json.dumps(c["model"] | {"class_path": "evil_module.Mine"})),
    "callbacks written as text": lambda c: c["trainer"].update(callbacks="[{class_path: evil_module.Mine}]"),
    "a callback written as text": lambda c: c["trainer"].update(callbacks=['{"class_path": "evil_module.Mine"}']),
    "names written as text": lambda c: c["trainer"].update(callbacks="[evil_module.Mine]"),
    "an escaped text": lambda c: c.update(model='{"class\\u005fpath": "evil_module.Mine"}'),
    "a text in a text": lambda c: c["trainer"].update(callbacks=json.dumps([json.dumps("evil_module.Mine")])),
    "a file": lambda c: c.update(model=a_file(c, "model.yaml")),
    "a file without a dot": lambda c: c.update(model=a_file(c, "model")),
    "a file beside the config": lambda c: c.update(model=Path(a_file(c, "lightning_logs/version_0/model")).name),
    "a file by its URL": lambda c: c.update(model=f"file://{a_file(c, 'model.yaml')}"),
    "a file that takes the place of the trainer": lambda c: c.update(trainer=a_file(c, "trainer", "trainer")),
}


def a_file(config: Any, name: str, what: str = "model") -> str:
    """A file with the hostile settings of a section."""
    path = Path(config["trainer"]["default_root_dir"]) / name
    hostile = {"class_path": "evil_module.Mine"}
    content = config["model"] | hostile if what == "model" else {"callbacks": [hostile]}
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("how", HOSTILE_CONFIGS)
def test_a_found_config_names_classes_of_this_package_and_of_lightning(
    how: str, found: Any, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    config = found(HOSTILE_CONFIGS[how])
    with pytest.raises(SystemExit) as stop:
        main(["validate", f"--trainer.default_root_dir={tmp_path}"])
    assert stop.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {config}, which was found and not named, names ")
    assert f"give --config {config}" in told
    assert not canary.exists()


def test_what_differs_from_a_foreign_run_is_told_without_importing_it(
    found: Any, canary: Path, distill_config: Path, capsys: pytest.CaptureFixture[str], no_models: None
) -> None:
    """`--resume` of a run of somebody else's, whose config lies beside the checkpoint."""
    config = found(HOSTILE_CONFIGS["model"])
    checkpoint = config.parent / "checkpoints" / "step=00000001.ckpt"
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(distill_config), "--resume", str(checkpoint)])
    assert "model.class_path: evil_module.Mine -> agri_moe.models.distill.DistillModule" in capsys.readouterr().err
    assert not canary.exists()


def test_a_config_that_the_user_names_is_the_users_own(found: Any, canary: Path, tmp_path: Path) -> None:
    """Their own class is imported; the run is another one then, by its fingerprint, and there is nothing to score."""
    config = found(HOSTILE_CONFIGS["model"])
    with pytest.raises(SystemExit):
        main(["validate", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"])
    assert canary.exists()


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_of_ours_passes(config: Path) -> None:
    check_found_config(config)


# ---------------------------------------------------------------------- the network

OFFLINE = """
import os, sys
def hook(event, args):
    if event == "socket.getaddrinfo" or (event == "socket.connect" and not isinstance(args[1], str)):
        os.write(2, f"NETWORK: {event} {args}\\n".encode())
        os._exit(9)
sys.addaudithook(hook)
import torch
torch.set_num_threads(1)
from agri_moe.cli import main
config, dense, rows, out = sys.argv[1:]
main(["upcycle", "--source", dense, "--output", f"{out}/moe", "--num_experts", "2"])
main(["audit", "--student", f"{out}/moe", "--source", dense])
main(["preview", "--config", config, "--rows", "1"])
main(["fit", "--config", config, "--trainer.max_steps=2"])
main(["validate", f"--trainer.default_root_dir={out}"])
run = f"{out}/lightning_logs/version_0"
main(["export", "--checkpoint", f"{run}/checkpoints/step=00000002.ckpt", "--output", f"{out}/e"])
main(["generate", "--model", f"{out}/e", "--input", rows, "--output", f"{out}/a.jsonl", "--max_new_tokens", "2"])
main(["report", "--run", run])
print("all done")
"""


def test_nothing_is_asked_of_the_network(distill_config: Path, dense: Path, corpus: Path, tmp_path: Path) -> None:
    """Everything is local, and nobody has said that the machine is offline."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"scenario": "धान"}))
    command = [sys.executable, "-c", OFFLINE, *map(str, (distill_config, dense, rows, tmp_path))]
    done = subprocess.run(command, env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert "NETWORK" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all done" in done.stdout


# ---------------------------------------------------------------------- dependencies


def test_pins_that_are_known_to_be_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import audit_pins

    text = "lightning==2.6.2\nTorch==2.5.1+cpu\ntransformers[torch]==5.17.0 ; python_version > '3'\nJinja2==3.1.6\n"
    bad = audit_pins.found(text)
    assert [line.split(":")[0] for line in bad] == ["lightning 2.6.2", "torch 2.5.1+cpu"]
    assert not audit_pins.found((ROOT / "constraints.txt").read_text())


@pytest.mark.parametrize(
    ("says", "status", "expected"),
    [("No known vulnerabilities", 0, 0), ("Found 1 known vulnerability", 1, 1), ("ConnectionError", 1, 0)],
)
def test_pip_audit_is_asked_where_it_is(
    says: str, status: int, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "audit_pins.py")], capture_output=True, check=False)
    assert done.returncode == expected
