"""What training leaves in the singular values of a network's layers, and in how they fit together.

Random matrices have the spectrum of Marchenko and Pastur; training adds a few large directions to
it (Martin and Mahoney 2021, https://jmlr.org/papers/v22/20-410.html), and turns the inputs that a
layer reads most strongly towards what the layer before it writes most strongly. Everything is
relative to the layer's own norm and shape. Permuting hidden channels changes nothing but the order
of sums.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

from weightnet.tokens.features import FEATURE_VALUES, Doubles, finite
from weightnet.tokens.networks import Networks, Stack

_WIDEST = 1024  # a layer whose inputs and outputs are both more is left out: O(width^3) operations
_SHARES = 5  # of the largest singular values
_LARGEST = 1e6
_TINY = 1e-12
_LAYER = (
    *("log_stable_rank", "entropy", "log_flatness", "log_edge", "outliers", "log_participation"),
    *("log_median", *(f"log_share{i}" for i in range(_SHARES))),
    *("log_fit", "log_fit_apart", "log_fit_sums"),
)
_PLACES = ("first", "middle", "last", "outputs", "mean", "std")


def spectral_statistics(networks: Networks) -> tuple[tuple[str, ...], Doubles]:
    """Names and values [B, S] for the first, middle and last hidden layer, the outputs, and mean
    and standard deviation over all; NaN where a layer has no such value.

    Of the squared singular values of a layer's weights [outputs, inputs x kernel]: their sum over
    the largest, the entropy of their shares and how far it is from its maximum, the largest over
    the edge of a random matrix of the same shape and norm, how many lie beyond that edge, the sum
    of squared shares, the median over the mean, and the largest shares. Of a layer and the one
    whose channels it reads: how much of what the one writes (its outputs' covariance for white
    inputs) the other reads, relative to layers that know nothing of each other (``fit``), the part
    of it that single channels' norms explain (``fit_apart``), and for inputs that do not vary over
    the kernel (``fit_sums``).
    """
    names = tuple(f"spectrum_{place}_{name}" for place in _PLACES for name in _LAYER)
    out = np.full((len(networks), len(names)), np.nan)
    for stack in networks.stacks(FEATURE_VALUES):
        layers = _layers(stack)
        if layers is not None:
            hidden = layers[:, :-1] if layers.shape[1] > 1 else layers
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # a value that no layer has
                over = [np.nanmean(layers, axis=1), np.nanstd(layers, axis=1)]
            parts = [hidden[:, 0], hidden[:, hidden.shape[1] // 2], hidden[:, -1], layers[:, -1]]
            out[stack.members] = np.concatenate([*parts, *over], axis=1)
    return names, out


def _layers(stack: Stack) -> Doubles | None:
    """[n, layers, len(_LAYER)] of the layers that mix channels; None if there are none."""
    plan, n = stack.layout, len(stack)
    rows: list[Doubles] = []
    written: list[tuple[NDArray[np.int32], Doubles]] = []
    for one in plan.layers:
        if not one.fan_in or one.groups > 1:
            continue
        row = np.full((n, len(_LAYER)), np.nan)
        rows.append(row)
        if min(one.outputs, one.fan_in) <= _WIDEST:
            weight = np.clip(finite(stack.weight(one)), -_LARGEST, _LARGEST).astype(np.float64)
            row[:, :-3] = _spectrum(weight)
        if max(one.outputs, one.inputs) <= _WIDEST:
            for channels, covariance in reversed(written):
                if np.array_equal(channels, one.sources):
                    row[:, -3:] = _fit(weight, covariance)
                    break
            covariance = np.matmul(weight, weight.swapaxes(1, 2))
            written.append((plan.channel[one.tokens], covariance))
    return np.stack(rows, axis=1) if rows else None


def _spectrum(weight: Doubles) -> Doubles:
    """Of [n, outputs, fan-in]."""
    if weight.shape[1] > weight.shape[2]:
        weight = weight.swapaxes(1, 2)
    _, few, many = weight.shape
    squares = np.linalg.eigvalsh(np.matmul(weight, weight.swapaxes(1, 2)))[:, ::-1]
    squares = np.clip(squares, 0, None) + _TINY
    share = squares / squares.sum(axis=1, keepdims=True)
    entropy = -(share * np.log(share)).sum(axis=1)
    edge = (1 + np.sqrt(few / many)) ** 2 / few
    top = np.full((len(weight), _SHARES), np.nan)
    top[:, : min(_SHARES, few)] = np.log(share[:, :_SHARES])
    columns = [
        -np.log(share[:, 0]),
        entropy,
        np.log(few) - entropy,
        np.log(share[:, 0] / edge),
        (share > edge).sum(axis=1),
        np.log((share**2).sum(axis=1) * few),
        np.log(np.median(squares, axis=1) / squares.mean(axis=1)),
    ]
    return np.concatenate([np.stack(columns, axis=1), top], axis=1)


def _fit(weight: Doubles, covariance: Doubles) -> Doubles:
    """Of ``weight`` [n, outputs, channels x values] and the ``covariance`` [n, channels, channels]
    of what it reads."""
    n, outputs, _ = weight.shape
    channels = covariance.shape[1]
    taps = weight.reshape(n, outputs, channels, -1)
    by_channel = taps.swapaxes(1, 2).reshape(n, channels, -1)
    total = np.trace(covariance, axis1=1, axis2=2)
    read = np.matmul(by_channel, by_channel.swapaxes(1, 2))
    sums = taps.sum(axis=3)
    read_sums = np.matmul(sums.swapaxes(1, 2), sums)

    def relative(found: Doubles, reading: Doubles) -> Doubles:
        scale = np.trace(reading, axis1=1, axis2=2) * total
        return np.asarray(np.log(found * channels / (scale + _TINY) + _TINY))

    apart = (np.diagonal(read, axis1=1, axis2=2) * np.diagonal(covariance, axis1=1, axis2=2)).sum(
        axis=1
    )
    columns = [
        relative((read * covariance).sum(axis=(1, 2)), read),
        relative(apart, read),
        relative((read_sums * covariance).sum(axis=(1, 2)), read_sums),
    ]
    return np.stack(columns, axis=1)
