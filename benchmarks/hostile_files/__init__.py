"""Small media files that lie, each in its own way: [`write_files`] makes the same ones at every call.

Most are written by hand, byte by byte, for no encoder would make them and because a picture of 400 million pixels is
then a few lines of arithmetic rather than a gigabyte of memory. The others come out of Pillow, soundfile and PyAV and
are cut, flipped or patched afterwards.
"""

from pathlib import Path

from .films import films
from .pictures import images
from .shared import attempt
from .sounds import sounds


__all__ = ["write_files"]


def write_files(root: Path) -> dict[str, list[Path]]:
    """Writes root/<kind>/<name>.<extension> for images, audio and video; the paths by kind.

    No two names are equal, also without extension and across kinds. A file that needs an encoder which is not
    available is left out.
    """
    written: dict[str, list[Path]] = {}
    stems = set()
    for kind, items in (("image", images()), ("audio", sounds()), ("video", films())):
        folder = root / kind
        folder.mkdir(parents=True, exist_ok=True)
        written[kind] = []
        for name, data in items:
            path = folder / name
            if path.stem in stems:
                raise ValueError(f"two files are named {path.stem}")
            stems.add(path.stem)
            if callable(data):
                data = attempt(data)
                if not data:
                    continue
            path.write_bytes(data)
            written[kind].append(path)
    return written
