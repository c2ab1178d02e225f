"""Tasks: fixed and disjoint parts, equal on every machine; absent images are explained."""

from importlib import resources
from pathlib import Path

import pytest
import torch

from weightnet import torchvision_import
from weightnet.tasks import TASKS, load_task
from weightnet.tasks import task as task_module

EMBEDDED = {"digits": (8, 897, 900), "fashion": (14, 20_000, 10_000)}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tasks_have_the_documented_shapes(name: str) -> None:
    size, train, test = EMBEDDED[name]
    task = load_task(name)
    assert task.train_images.shape == (train, 1, size, size)
    assert task.test_images.shape == (test, 1, size, size)
    assert task.train_images.dtype == task.test_images.dtype == torch.uint8
    assert (task.channels, task.size, task.classes) == (1, size, 10)
    for labels, count in ((task.train_labels, train), (task.test_labels, test)):
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_image_is_both_trained_on_and_tested(name: str) -> None:
    task = load_task(name)
    train = {image.numpy().tobytes() for image in task.train_images}
    shared = sum(image.numpy().tobytes() in train for image in task.test_images)
    assert shared == 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_two_loads_are_equal(name: str) -> None:
    first, second = load_task(name), TASKS[name]()
    assert first is not second
    assert first.digest() == second.digest()


def test_normalized_training_pixels_have_zero_mean_and_unit_deviation() -> None:
    task = load_task("digits")
    pixels = task.normalize(task.train_images)
    assert pixels.dtype == torch.float32
    assert abs(float(pixels.mean())) < 1e-4
    assert abs(float(pixels.std()) - 1) < 1e-4


def test_the_shipped_file_is_small_and_has_its_licence() -> None:
    folder = resources.files("weightnet.tasks")
    assert len((folder / "fashion_14x14.npz").read_bytes()) <= 6 * 2**20
    assert "MIT" in (folder / "FASHION_LICENSE").read_text(encoding="utf-8")


def test_an_unknown_task_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"task must be one of .*digits.*, however: task='cats'"):
        load_task("cats")


class _Absent:
    """A torchvision data set that is neither on disk nor downloadable."""

    def __init__(self, root: str, download: bool, **_: object) -> None:
        raise OSError("no network") if download else RuntimeError("Dataset not found")


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist", "cifar10", "svhn"])
def test_absent_images_are_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = torchvision_import.load_torchvision().datasets
    for dataset in ("FashionMNIST", "MNIST", "CIFAR10", "SVHN"):
        monkeypatch.setattr(datasets, dataset, _Absent)
    monkeypatch.setenv(task_module.DATA_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError, match="must be on disk or downloadable") as caught:
        load_task(name)
    message = str(caught.value)
    for part in (str(tmp_path / name), "Dataset not found", "no network", "WEIGHTNET_TASKS"):
        assert part in message
