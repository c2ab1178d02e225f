"""Learned probes: inputs distilled from the training networks, and how a network answers them.

The probes of one task are images, drawn as smooth random fields and changed by gradient ascent
until the most accurate training networks agree that each shows a given class, or a given mixture
of two (DeepInversion, Yin et al. 2020, https://arxiv.org/abs/1912.08795; learned probes for weight
spaces: Kahana et al. 2024, https://arxiv.org/abs/2410.13569). No image of any task is seen: all
that is known of a task comes from the weights and the measured accuracies of training networks. A
network that has learned the task answers as the most accurate networks do, and the more surely so
on noisy copies, the better it is; this consensus takes part in the features without a network's
own vote.

Networks whose inputs, outputs or task no training network has share no probes with them: their
features are missing. (Told by the probes of another task of the same shape, networks of an unseen
one were ranked worse than without: docs/LOG.md.) A network of no declared task is read by the
probes that it agrees with most. Answers are functions of the network, so they are the same for
permuted and rescaled copies but for rounding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from weightnet.params import Params
from weightnet.predictors.features import Features
from weightnet.predictors.interface import read_arrays, write_arrays, write_json
from weightnet.predictors.scaling import Array
from weightnet.randomness import torch_generator
from weightnet.tokens import network_outputs

if TYPE_CHECKING:
    from weightnet.tokens import Networks

NOISE = (0.0, 0.4, 1.0)  # standard deviations of the noise on the copies of each probe
TEACHERS = 24  # most accurate training networks, from which the probes of a task are distilled
TEACHERS_A_STEP = 6
CONSENSUS = 40  # most accurate training networks, whose answers count as right
MOST = 200  # probes of a task, however many classes it has
FEWEST = 10  # training networks of a task, or it has no probes
RATE = 0.08  # of Adam, in standard deviations of an image
SLOPE = 2.0  # of the amplitude over spatial frequency, of the images at first
JITTER = 0.2  # standard deviation of the noise that the probes must survive while they are learned
SMOOTH, SMALL = 0.2, 0.2  # weights of squared differences between pixels, and of squared pixels
TINY = 1e-6
COLUMNS = (
    "agreement", "likelihood", "same", "overlap", "difference", "confidence", "entropy",
)  # fmt: skip


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one ``task``: ``images`` [V * N, ...], each noise's copies one after another,
    and the consensus on them: sums over the ``members`` (run ids) of probabilities and of
    standardized logits [V * N, C]."""

    task: str
    images: Array
    chances: Array
    logits: Array
    members: tuple[str, ...]


class LearnedProbesConfig(Params):
    """``per_class`` images for each class of each task (0 for none), learned in ``steps``."""

    per_class: int = Field(default=0, ge=0)
    steps: int = Field(default=100, ge=0)


@dataclass
class LearnedProbes:
    """The probes of the tasks of the training networks, a set for each."""

    config: LearnedProbesConfig
    seed: int
    sets: list[ProbeSet] = field(default_factory=list)

    def fit(self, networks: Networks, accuracy: Array) -> None:
        """Distill the probes of each task from training networks with these accuracies [B] (in any
        increasing unit; NaN where unknown).

        Raises:
            ValueError: if the networks cannot be run.
        """
        self.sets = []
        _expect_runnable(networks)
        classes = _outputs(networks)
        keys = networks.frame[["input", "task"]].astype(str).assign(classes=classes)
        for key, rows in keys.groupby(list(keys)).groups.items():
            shape, task, count = key  # type: ignore[misc]
            members = np.array([i for i in rows if np.isfinite(accuracy[i])], dtype=np.int64)
            if len(members) < FEWEST or int(count) < 2:
                continue
            best = members[np.argsort(-accuracy[members], kind="stable")]
            generator = torch_generator(self.seed, "learned probes", str(shape), str(task))
            images = self._distill(
                networks.select(best[:TEACHERS]), json.loads(shape), int(count), generator
            )
            noisy = [images + n * torch.randn(images.shape, generator=generator) for n in NOISE]
            shown = torch.cat(noisy)
            consensus = networks.select(best[:CONSENSUS])
            answers = [_answer(consensus, i, shown) for i in range(len(consensus))]
            self.sets.append(
                ProbeSet(
                    str(task),
                    shown.numpy(),
                    np.sum([_chances(one) for one in answers], axis=0),
                    np.sum([_standardized(one) for one in answers], axis=0),
                    tuple(consensus.frame["run"].astype(str)),
                )
            )

    def features(self, networks: Networks) -> Features:
        """How each network answers the probes of its task (of the set that it agrees with most, if
        the column task is empty), NaN without any.

        Raises:
            ValueError: if the networks cannot be run.
        """
        _expect_runnable(networks)
        names = tuple(f"learned_{name}_{level:g}" for level in NOISE for name in COLUMNS)
        values = np.full((len(networks), len(names)), np.nan)
        shown = [(one, torch.from_numpy(one.images)) for one in self.sets]
        classes, runs = _outputs(networks), networks.frame["run"].astype(str).tolist()
        shapes = networks.frame["input"].astype(str).tolist() if self.sets else []
        tasks = networks.frame["task"].astype(str).tolist()
        for i in range(len(networks) if self.sets else 0):
            found = []
            for one, images in shown:
                shaped = list(images.shape[1:]) == json.loads(shapes[i])
                if shaped and one.logits.shape[1] == classes[i] and tasks[i] in ("", one.task):
                    found.append(_compare(_answer(networks, i, images), one, runs[i]))
            if found:
                values[i] = max(found, key=lambda row: row[0])
        return Features(names, values)

    def write(self, folder: Path) -> None:
        """Write the probes to ``folder``."""
        if self.sets:
            arrays = {
                f"{i}.{name}": getattr(one, name)
                for i, one in enumerate(self.sets)
                for name in ("images", "chances", "logits")
            }
            write_arrays(folder / "probes.safetensors", arrays)
        write_json(folder / "probes.json", [[one.task, one.members] for one in self.sets])

    def read(self, folder: Path) -> None:
        """Read what `write` wrote."""
        known = json.loads((folder / "probes.json").read_text(encoding="utf-8"))
        arrays = read_arrays(folder / "probes.safetensors") if known else {}
        self.sets = [
            ProbeSet(
                task,
                arrays[f"{i}.images"],
                arrays[f"{i}.chances"],
                arrays[f"{i}.logits"],
                tuple(runs),
            )
            for i, (task, runs) in enumerate(known)
        ]

    def _distill(
        self, teachers: Networks, shape: list[int], classes: int, generator: torch.Generator
    ) -> Tensor:
        """Images [N, ...] on which the teachers agree."""
        count = min(classes * self.config.per_class, MOST)
        label = torch.arange(count) % classes
        other = (label + torch.randint(1, classes, (count,), generator=generator)) % classes
        share = torch.rand(count, 1, generator=generator) * 0.5
        wanted = (1 - share) * F.one_hot(label, classes) + share * F.one_hot(other, classes)
        images = _smooth(count, shape, generator).requires_grad_()
        optimizer = torch.optim.Adam([images], lr=RATE)
        states = [teachers.state(i) for i in range(len(teachers))]
        for _ in range(self.config.steps):
            chosen = torch.randperm(len(teachers), generator=generator)[:TEACHERS_A_STEP].tolist()
            seen = images + JITTER * torch.randn(images.shape, generator=generator)
            loss = SMALL * images.square().mean()
            for axis in range(2, images.ndim):
                loss = loss + SMOOTH * images.diff(dim=axis).square().mean()
            for i in chosen:
                logits = network_outputs(teachers.module(i), states[i], seen)
                loss = loss + F.cross_entropy(logits, wanted) / len(chosen)
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
        return images.detach()


def _expect_runnable(networks: Networks) -> None:
    if networks.modules is None or "input" not in networks.frame:
        raise ValueError(
            "networks must come with their modules and the column input to be probed, however: "
            f"modules={networks.modules}, columns {', '.join(map(str, networks.frame.columns))}; "
            "call networks.runnable(modules), or set learned_probes.per_class=0"
        )


def _outputs(networks: Networks) -> list[int]:
    return [one.layers[-1].outputs if one.layers else 0 for one in networks.layouts()]


def _smooth(count: int, shape: list[int], generator: torch.Generator) -> Tensor:
    """Random fields [count, *shape] with a power-law spectrum over the axes after the first."""
    white = torch.randn(count, *shape, generator=generator)
    axes = list(range(2, white.ndim))
    if not axes:
        return white
    square = torch.zeros(shape[1:])
    for place, size in enumerate(shape[1:]):
        frequency = torch.fft.fftfreq(size, 1 / size)
        square = square + frequency.square().view(-1, *[1] * (len(axes) - 1 - place))
    shaped = (square.sqrt() + 1) ** -SLOPE
    drawn = torch.fft.ifftn(torch.fft.fftn(white, dim=axes) * shaped, dim=axes).real
    flat = drawn.flatten(1)
    flat = (flat - flat.mean(1, keepdim=True)) / (flat.std(1, keepdim=True) + TINY)
    return flat.view_as(drawn)


@torch.no_grad()
def _answer(networks: Networks, position: int, images: Tensor) -> Array:
    """Logits of one network [N, C]; those of a diverged one are cut off."""
    module, state = networks.module(position), networks.state(position)
    parts = [network_outputs(module, state, part) for part in images.split(100)]
    return np.clip(np.nan_to_num(torch.cat(parts).double().numpy()), -1e4, 1e4)


def _chances(logits: Array) -> Array:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _standardized(logits: Array) -> Array:
    centered = logits - logits.mean(axis=1, keepdims=True)
    return centered / (centered.std() + TINY)


def _compare(logits: Array, one: ProbeSet, run: str) -> Array:
    """`COLUMNS` for each noise: the network's answers against the consensus of the others."""
    chances, standardized = _chances(logits), _standardized(logits)
    own = float(run in one.members)
    others = len(one.members) - own
    right = (one.chances - own * chances) / others
    target = one.logits - own * standardized
    log = np.log(np.maximum(chances, 1e-30))
    values = []
    views = np.split(np.arange(len(logits)), len(NOISE))
    for rows in views:
        mine, theirs = standardized[rows].ravel(), target[rows].ravel()
        scale = np.linalg.norm(mine) * np.linalg.norm(theirs) + TINY
        p, q = chances[rows], right[rows]
        values += [
            mine @ theirs / scale,
            (q * log[rows]).sum(axis=1).mean(),
            (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
            (p * q).sum(axis=1).mean(),
            np.sqrt(np.square(p - q).sum(axis=1)).mean(),
            p.max(axis=1).mean(),
            -(p * log[rows]).sum(axis=1).mean(),
        ]
    return np.array(values)
