"""Make the embedded `fashion` task from the original Fashion-MNIST files (Xiao et al. 2017,
https://arxiv.org/abs/1708.07747; MIT licence, beside the result as FASHION_LICENSE).

    python -m weightnet.tasks.pool_fashion FOLDER

FOLDER holds the four original `*-ubyte.gz` files, as Debian's package `dataset-fashion-mnist` or
torchvision's download leaves them. The first 20,000 training images and all 10,000 test images are
2 x 2 average-pooled to 14 x 14 and rounded to 8 bit. The same input gives the same bytes.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

TRAIN_IMAGES = 20_000


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one gzipped IDX file of unsigned bytes (format: http://yann.lecun.com/exdb/mnist/)."""
    raw = gzip.decompress(path.read_bytes())
    dimensions = raw[3]
    shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def pool(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Average 2 x 2 pixels: uint8 [N, 28, 28] -> uint8 [N, 14, 14], rounded half up."""
    blocks = images.reshape(len(images), 14, 2, 14, 2).astype(np.uint16).sum(axis=(2, 4))
    return ((blocks + 2) // 4).astype(np.uint8)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the four *-ubyte.gz files.")],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path(__file__).parent
    / "fashion_14x14.npz",
) -> None:
    """Pool Fashion-MNIST to 14 x 14 and write the arrays that the package ships."""
    arrays: dict[str, NDArray[Any]] = {}
    for part, prefix, count in (("train", "train", TRAIN_IMAGES), ("test", "t10k", 10_000)):
        for what, suffix in (("images", "images-idx3"), ("labels", "labels-idx1")):
            path = folder / f"{prefix}-{suffix}-ubyte.gz"
            if not path.is_file():
                typer.echo(
                    f"{path} must exist, however: no such file; get Fashion-MNIST first", err=True
                )
                raise typer.Exit(2)
            values = read_idx(path)[:count]
            arrays[f"{part}_{what}"] = pool(values) if what == "images" else values
    np.savez_compressed(out, allow_pickle=False, **arrays)
    typer.echo(f"wrote {out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
