"""A folder as one tar cut into parts of limited size, and back.

python -m dit_accel.pipelines.shapes.transfer split FOLDER PARTS --mib 15
python -m dit_accel.pipelines.shapes.transfer join PARTS FOLDER
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

_PART = "pipeline.tar.{:02d}"


def split_folder(folder: Path, parts: Path, mib: int = 15) -> list[Path]:
    """Writes ``pipeline.tar.00``, ``.01``, … of at most ``mib`` MiB into ``parts``; earlier parts there go."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            tar.add(file, arcname=str(file.relative_to(folder)))
    data, size = buffer.getvalue(), mib << 20
    parts.mkdir(parents=True, exist_ok=True)
    for stale in parts.glob(_PART.format(0)[:-2] + "*"):
        stale.unlink()
    written = []
    for index, offset in enumerate(range(0, len(data), size)):
        written.append(parts / _PART.format(index))
        written[-1].write_bytes(data[offset : offset + size])
    return written


def join_folder(parts: Path, folder: Path) -> None:
    """Unpacks what ``split_folder`` wrote.

    Raises:
        ValueError: when ``parts`` holds no part.
    """
    files = sorted(parts.glob(_PART.format(0)[:-2] + "*"))
    if not files:
        raise ValueError(f"the folder {str(parts)!r} holds no {_PART.format(0)}: name the folder that split wrote to")
    buffer = io.BytesIO(b"".join(file.read_bytes() for file in files))
    with tarfile.open(fileobj=buffer) as tar:
        tar.extractall(folder, filter="data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("split", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=int, default=15, help="largest part in MiB (split)")
    args = parser.parse_args()
    if args.action == "split":
        split_folder(args.source, args.target, args.mib)
    else:
        join_folder(args.source, args.target)


if __name__ == "__main__":
    main()
