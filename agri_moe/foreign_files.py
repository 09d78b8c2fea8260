"""What a file that came from somewhere else must not do: run code, or lead out of its folder.

Weights are safetensors, or torch's files read with `weights_only`. Two kinds of file need more: the table of a sharded
checkpoint, which torch keeps as a pickle, and a run's config that a command has found by itself, which names classes
to import. A config that the user names is the user's own code, and none of this looks at it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import pickle
import pickletools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from agri_moe.data.chat import shown

TABLE = ".metadata"
"""The pickled table of a sharded checkpoint, as `torch.distributed.checkpoint` names it."""

_CHECKPOINT = "torch.distributed.checkpoint"
_IN_TABLES = frozenset(
    (
        *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta")),
        *((f"{_CHECKPOINT}.metadata", name) for name in ("TensorStorageMetadata", "BytesStorageMetadata")),
        *((f"{_CHECKPOINT}.metadata", name) for name in ("ChunkStorageMetadata", "TensorProperties")),
        *((f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"), (f"{_CHECKPOINT}.filesystem", "_StorageInfo")),
        *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
        # Where it was written; Python 3.13 has its paths elsewhere.
        *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    )
)
_PIECE = re.compile(r"__\d+_\d+\.distcp")

TRUSTED = frozenset(("agri_moe", "lightning"))
"""Packages whose classes a config may name that no user has named."""
_TEXT = frozenset(
    (
        *("source", "tokenizer", "train", "validation", "test", "cache", "cache_dir", "default_root_dir", "save_dir"),
        *("columns", "text_column", "group_by", "freeze"),
    )
)
"""Keys of paths, columns and patterns, never imported, that may look like the name of a class (rows.parquet)."""


# ---------------------------------------------------------------------- checkpoints


def load_state(path: Path, key: str, **options: Any) -> Any:
    """What `torch.save` has written, as long as it is tensors and plain values.

    Args:
        path: The file.
        key: The option that gave it, for messages.
        **options: For `torch.load`.

    Raises:
        ValueError: If it holds anything else, or is damaged.
    """
    import torch

    try:
        return torch.load(path, weights_only=True, **options)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"{key}: {path} is not loaded, because it is damaged or could run code ({_first_line(error)}); use a "
            "checkpoint that a run of yours has saved."
        ) from error


def _first_line(error: Exception) -> str:
    return shown(next(iter(str(error).strip().splitlines()), type(error).__name__)).rstrip(".")


class _TableReader(pickle.Unpickler):
    """Knows what tables are made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _IN_TABLES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its table names {module}.{name}")


def check_sharded(folder: Path, key: str) -> None:
    """Refuse a sharded checkpoint that would run code, or read outside its folder, when torch loads it.

    torch unpickles the table, and what is no tensor, without restrictions. Both are read here first: the table by a
    reader that knows only the classes that tables are made of, the rest with `weights_only`. What passes is harmless to
    torch's own reader too.

    Args:
        folder: The checkpoint.
        key: The option that gave it, for messages.

    Raises:
        ValueError: If it is not what FSDP2 saves.
    """
    import torch

    try:
        for piece, offset, length in _no_tensors(folder):
            with piece.open("rb") as file:
                file.seek(offset)
                torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
        torch.load(folder / "meta.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a hostile file can make these readers fail in any way
        raise ValueError(
            f"{key}: {folder} is not loaded, because it is damaged or could run code ({_first_line(error)}); use a "
            "checkpoint that a run of yours has saved."
        ) from error


def check_pieces(folder: Path) -> None:
    """Refuse a sharded checkpoint, just saved, of which a piece is elsewhere.

    Raises:
        OSError: If its table names a file that is not there, as where each node has a disk of its own.
    """
    for info in _table(folder).storage_data.values():
        if not (folder / str(info.relative_path)).exists():
            raise FileNotFoundError(
                errno.ENOENT,
                f"{info.relative_path} of another rank is not there, and trainer.default_root_dir must be a folder "
                "that all nodes share",
            )


def _table(folder: Path) -> Any:
    """The table of a sharded checkpoint, no code of it run."""
    from torch.distributed.checkpoint.metadata import Metadata

    content = (folder / TABLE).read_bytes()
    for operation, argument, _ in pickletools.genops(content):
        if "PUT" in operation.name and (argument or 0) > len(content):  # it would take memory for as many values
            raise ValueError("its table numbers values that it does not have")
    table = _TableReader(io.BytesIO(content)).load()
    if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
        raise ValueError("its table is none")
    return table


def _no_tensors(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """File, first byte and length of what a checkpoint holds that is no tensor; every file is inside the folder."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

    table = _table(folder)
    tensors = {name for name, kind in table.state_dict_metadata.items() if isinstance(kind, TensorStorageMetadata)}
    others = {name for name, kind in table.state_dict_metadata.items() if type(kind) is BytesStorageMetadata}
    if tensors | others != table.state_dict_metadata.keys():
        raise ValueError("its table has entries of no known kind")
    for index, info in table.storage_data.items():
        name = str(info.relative_path)
        if not _PIECE.fullmatch(name) or (folder / name).is_symlink():
            raise ValueError(f"its table names {name!r}, which is no file of a checkpoint")
        if info.transform_descriptors:
            raise ValueError("its table names a transformation")
        if index.fqn in others:
            yield folder / name, int(info.offset), int(info.length)


# ---------------------------------------------------------------------- configs that a command has found


def read_config(config: Path) -> dict[str, Any]:
    """The settings of a config, nothing that it names imported.

    Raises:
        ValueError: If it is none.
    """
    try:
        content = yaml.safe_load(config.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # a date may be none, too
        raise ValueError(f"{config} cannot be read ({type(error).__name__}); name a config with --config.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{config} holds no settings; name a config with --config.")
    return content


def check_found_config(config: Path) -> None:
    """Refuse a config that nobody has named, if parsing it would import anything but classes of `TRUSTED`.

    Wherever a class is expected, jsonargparse imports the module that a string names; and it reads a string as YAML, or
    the file that it names, before.

    Raises:
        ValueError: If it would, or is no config.
    """
    content = read_config(config)
    try:
        named = next((name for name in _imported(content, config.parent) if not _is_trusted(name)), None)
    except RecursionError:
        named = "settings within settings without end"
    if "config" in content:
        named = "another config"
    if named is not None:
        raise ValueError(
            f"{config}, which was found and not named, names {shown(named)}, which is of no package that it may "
            f"name ({', '.join(sorted(TRUSTED))}): give --config {config} if you trust it."
        )


def _imported(value: Any, folder: Path) -> Iterator[str]:
    """The strings of a config that may be taken for the name of a class or function, or of a file of settings.

    Args:
        value: The config, or a part of it.
        folder: Where it lies: the names of files count from there too.
    """
    if isinstance(value, str):
        if "." in value and all(part.strip().isidentifier() for part in value.split(".")):
            yield value
        elif _is_file(value, folder):
            yield f"the file {value}"
        else:
            with contextlib.suppress(yaml.YAMLError, ValueError):  # which is text, then
                settings = yaml.safe_load(value)
                if settings != value:
                    yield from _imported(settings, folder)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key == "class_path":
                yield str(part)
            elif key not in _TEXT or not _is_text(part):
                yield from _imported(part, folder)
    elif isinstance(value, list):
        for part in value:
            yield from _imported(part, folder)


def _is_file(value: str, folder: Path) -> bool:
    """Whether jsonargparse could read settings from what this names."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # too long, no path, no such user's home
        path = Path(re.sub("^file:///?", "/", value)).expanduser()
        return any(place.exists() and not place.is_dir() for place in (path, folder / path))
    return False


def _is_text(value: Any) -> bool:
    """Whether this is a text, or a list or mapping of texts."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return all(isinstance(part, str) for part in parts) and not (isinstance(value, dict) and "class_path" in value)


def _is_trusted(name: str) -> bool:
    """Whether a name is that of something that a trusted package defines, and not only imports, as it may `os`."""
    if name.isidentifier():
        return True  # one of the classes that are imported already
    module, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")) or module.split(".")[0] not in TRUSTED:
        return False
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        return False
    return str(getattr(found, "__module__", "")).split(".")[0] in TRUSTED
