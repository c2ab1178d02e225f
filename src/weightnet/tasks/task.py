"""Image-classification tasks: images and labels in memory, with fixed train and test parts.

`digits` and `fashion` are embedded (scikit-learn ships the former, this package the latter) and
need no network. `fashion_mnist`, `mnist`, `cifar10` and `svhn` come at full resolution through
torchvision, from a local folder or by download. Two loads of one task give the same tensors on
every machine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DATA_FOLDER_VARIABLE = (
    "WEIGHTNET_TASKS"  # environment: where torchvision's data sets lie or are downloaded to
)
DEFAULT_DATA_FOLDER = Path("data/tasks")
_FASHION_FILE = "fashion_14x14.npz"
_DIGITS_TRAIN_IMAGES = 897  # of 1,797: as many held-out images as possible, for precise properties


@dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
        name: The task's name in params.yaml.
        train_images: uint8 [N, channels, height, width].
        train_labels: int64 [N], in 0 .. C-1.
        test_images: uint8 [N, channels, height, width], disjoint from the training images.
        test_labels: int64 [N].
        classes: C.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int = 10

    @property
    def channels(self) -> int:
        """Image channels: 1 for grey, 3 for colour."""
        return int(self.train_images.shape[1])

    @property
    def size(self) -> int:
        """Height (= width) of an image in pixels."""
        return int(self.train_images.shape[2])

    @cached_property
    def pixel_statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the training pixels, on the scale 0 .. 1."""
        pixels = self.train_images.to(torch.float64) / 255
        return float(pixels.mean()), float(pixels.std())

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images -> float32 images with zero mean and unit deviation over the training
        pixels."""
        mean, deviation = self.pixel_statistics
        return (images.to(torch.float32) / 255 - mean) / deviation

    @cached_property
    def train_inputs(self) -> Tensor:
        """The normalized training images."""
        return self.normalize(self.train_images)

    def digest(self) -> str:
        """SHA-256 of the task's images and labels: part of the key of everything trained on
        them."""
        digest = hashlib.sha256(self.name.encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def load_task(name: str) -> Task:
    """Load a task by name.

    Raises:
        ValueError: if the name is unknown, or the images are neither at hand nor downloadable.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}, however: task={name!r}")
    return _load(name)


@cache
def _load(name: str) -> Task:
    return TASKS[name]()


def _digits() -> Task:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    order = np.random.default_rng(0).permutation(
        len(bunch.target)
    )  # the file is ordered by writer
    images = np.round(bunch.images[order] * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target[order].astype(np.int64)
    cut = _DIGITS_TRAIN_IMAGES
    return _task("digits", images[:cut], labels[:cut], images[cut:], labels[cut:])


def _fashion() -> Task:
    path = resources.files("weightnet.tasks") / _FASHION_FILE
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return _task(
            "fashion",
            arrays["train_images"][:, None],
            arrays["train_labels"].astype(np.int64),
            arrays["test_images"][:, None],
            arrays["test_labels"].astype(np.int64),
        )


def _task(
    name: str,
    train_images: NDArray[Any],
    train_labels: NDArray[Any],
    test_images: NDArray[Any],
    test_labels: NDArray[Any],
) -> Task:
    def tensor(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return Task(
        name, tensor(train_images), tensor(train_labels), tensor(test_images), tensor(test_labels)
    )


def _from_torchvision(name: str, dataset: str) -> Callable[[], Task]:
    def load() -> Task:
        from weightnet.torchvision_import import load_torchvision

        constructor = getattr(load_torchvision().datasets, dataset)
        folder = Path(os.environ.get(DATA_FOLDER_VARIABLE, DEFAULT_DATA_FOLDER)) / name
        parts = []
        for train in (True, False):
            part = (
                {"split": "train" if train else "test"} if dataset == "SVHN" else {"train": train}
            )
            parts.append(_arrays(constructor, folder, name, part))
        (images, labels), (test_images, test_labels) = parts
        return _task(name, images, labels, test_images, test_labels)

    return load


def _arrays(
    constructor: Callable[..., Any], folder: Path, name: str, part: dict[str, Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        data = constructor(root=str(folder), download=False, **part)
    except Exception as local:  # RuntimeError, OSError, EOFError and others
        try:
            folder.mkdir(parents=True, exist_ok=True)
            data = constructor(root=str(folder), download=True, **part)
        except Exception as remote:
            raise ValueError(
                f"task {name} must be on disk or downloadable, however: nothing usable in "
                f"{folder} ({_first_line(local)}) and the download failed "
                f"({_first_line(remote)}); put torchvision's {constructor.__name__} files into "
                f"{folder}, or name another folder by the environment variable "
                f"{DATA_FOLDER_VARIABLE}, or use the embedded tasks digits and fashion"
            ) from None
    images = np.asarray(data.data)
    labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels).astype(np.int64)
    if images.ndim == 3:  # MNIST: [N, H, W]
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: [N, H, W, 3]; SVHN is [N, 3, H, W] already
        images = images.transpose(0, 3, 1, 2)
    return images, labels


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


TASKS: dict[str, Callable[[], Task]] = {
    "digits": _digits,
    "fashion": _fashion,
    "fashion_mnist": _from_torchvision("fashion_mnist", "FashionMNIST"),
    "mnist": _from_torchvision("mnist", "MNIST"),
    "cifar10": _from_torchvision("cifar10", "CIFAR10"),
    "svhn": _from_torchvision("svhn", "SVHN"),
}
