"""Whether the rows under a name are still those that a run was trained on."""

import functools
import hashlib
from pathlib import Path

from agri_moe.data.sources import Source, file_stamp, hub_dataset, of_each

WHOLE = 16_000_000
"""Bytes up to which a file is read whole; of a larger one, its size and pieces of it."""
PIECES, PIECE = 16, 65_536


def content_fingerprint(sources: list[Source], streamed: bool = False) -> str:
    """A hash of what the sources hold, whatever they are called and whenever they were copied.

    Of large files it takes the size and 1 MB in 16 pieces from beginning to end, where Parquet keeps the statistics of
    its columns; of files behind a URL, what their store says of them; of hub datasets, their fingerprint there.

    Args:
        sources: As `find_sources` found them; their order counts.
        streamed: Whether a hub dataset is not downloaded: only its name counts then.
    """
    digest = hashlib.sha256()
    for part in of_each(sources, functools.partial(_one, streamed=streamed)):
        digest.update(part)
    return digest.hexdigest()


def _one(source: Source, streamed: bool) -> bytes:
    if source.kind == "hub":
        return (source.name if streamed else str(hub_dataset(source.name)._fingerprint)).encode()
    path = Path(source.name)
    if not path.exists():  # behind a URL
        return repr(file_stamp(source.name)).encode()
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for piece in range(PIECES):
                file.seek((size - PIECE) * piece // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.digest()
