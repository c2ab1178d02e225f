"""Data-free probes: what every neuron answers to fixed, smooth random inputs.

The inputs are random fields with power-law spectra, half of them turned into two-valued blobs,
and noisy copies of each: no image of any task is ever seen. A neuron's response is the output of
its layer (after the layer's normalization, before the activation), averaged over space. Permuting
hidden neurons permutes responses and changes nothing else, so a predictor that reads them stays
invariant; it needs a forward pass, and no data (probing: Herrmann et al. 2024,
https://arxiv.org/abs/2410.12440; Kahana et al. 2024, https://arxiv.org/abs/2410.13569).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from weightnet.params import Params
from weightnet.randomness import numpy_generator
from weightnet.symmetry.spec import Layer, PermutationSpec
from weightnet.tokens.features import LIMIT, Longs
from weightnet.tokens.tokenizer import Floats

NOISE = (0.1, 0.3, 1.0)  # standard deviations of the noise on the copies of each input
VIEWS = 1 + len(NOISE)
SLOPES = (0.5, 1.0, 2.0, 3.0)  # of the amplitude over spatial frequency
RAW = 16  # answers that are read one by one
TINY = 1e-6


class ProbesConfig(Params):
    """``count`` inputs (0 for no probes), each also seen with noise of `NOISE`; ``seed`` draws
    them."""

    count: int = Field(default=32, ge=0)
    seed: int = 0

    def inputs(self, shape: Sequence[int]) -> Tensor:
        """The inputs [VIEWS * count, *shape]: clean ones, then each noise's copies.

        ``shape`` is [channels, height, width]; inputs of another rank are one row of as many
        independent pixels.
        """
        generator = numpy_generator("probes", self.seed, *shape)
        channels, *size = shape if len(shape) == 3 else (1, 1, math.prod(shape))
        radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in size), indexing="ij"))
        if len(shape) != 3:
            radius = np.zeros_like(radius)
        fields = []
        for index in range(self.count):
            white = generator.standard_normal((1 + channels, *size))
            shaped = (radius + 1.0) ** -SLOPES[index % len(SLOPES)]
            smooth = np.fft.ifft2(np.fft.fft2(white) * shaped).real
            field = smooth[:1] + (0.5 * smooth[1:] if channels > 1 else 0)
            field = (field - field.mean()) / field.std()
            if index // len(SLOPES) % 2:
                low, high = generator.uniform(-1, -0.3), generator.uniform(1, 2.5)
                field = np.where(field > generator.uniform(-0.5, 1), high, low)
            fields.append(field)
        clean = np.stack(fields) if fields else np.zeros((0, channels, *size))
        noise = generator.standard_normal(clean.shape)
        views = [clean, *(clean + level * noise for level in NOISE)]
        drawn = np.concatenate(views).astype(np.float32)
        return torch.from_numpy(drawn.reshape(len(drawn), *shape))


def probe_responses(
    module: nn.Module, spec: PermutationSpec, state: Mapping[str, Tensor], inputs: Tensor
) -> dict[int, Floats]:
    """What each neuron of each layer answers: for every layer index an array [outputs, N].

    Args:
        module: the architecture, in whatever state; it is left as it is.
        spec: its permutation spec.
        state: the weights to run it with.
        inputs: [N, channels, height, width]; the forward pass runs in float64, or the answers of
            a neuron that hardly answers would be rounding errors.

    Raises:
        ValueError: if a layer is not computed by a module of its own, so that its output cannot
            be seen.
    """
    found: dict[int, list[Tensor]] = {layer.index: [] for layer in spec.layers}
    training, inputs = module.training, inputs.double()
    with ExitStack() as stack, torch.no_grad():
        for layer in spec.layers:
            part = module.get_submodule(_path(layer))
            handle = part.register_forward_hook(_recorder(layer, found[layer.index]))
            stack.callback(handle.remove)
        stack.callback(module.train, training)
        module.eval()
        given = {name: tensor.to(inputs) for name, tensor in state.items()}
        given |= _untrained(module, given, torch.float64)
        for part_inputs in inputs.split(64):
            functional_call(module, given, (part_inputs,))
    for layer in spec.layers:
        if sum(len(part) for part in found[layer.index]) != len(inputs):
            raise ValueError(
                "each layer must be computed once by a module of its own to be probed, however: "
                f"{layer.name} is not; set tokenize_zoo.probes.count=0"
            )
    return {
        index: torch.cat(parts).T.contiguous().float().numpy() for index, parts in found.items()
    }


def network_outputs(module: nn.Module, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """What a network answers to ``inputs`` [N, ...]: [N, C]; differentiable in the inputs.

    Args:
        module, state: as in `probe_responses`; the dtype is that of the inputs.
    """
    training = module.training
    module.eval()
    try:
        given = {name: tensor.to(inputs.dtype) for name, tensor in state.items()}
        given |= _untrained(module, given, inputs.dtype)
        answered: Tensor = functional_call(module, given, (inputs,))
    finally:
        module.train(training)
    return answered


def _untrained(
    module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the weights leave out: constants as they are, in ``dtype``; zeros for what has no
    storage (integer counters)."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left_out = {name: tensor for name, tensor in tensors if name not in state}
    return {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_meta
        else (tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for name, tensor in left_out.items()
    }


def _path(layer: Layer) -> str:
    """The module whose output is the layer's, its normalization included."""
    key = layer.scale or layer.mean or layer.weight or layer.shift or ""
    return key.rpartition(".")[0]


def _recorder(layer: Layer, into: list[Tensor]) -> Callable[[nn.Module, object, object], None]:
    outputs = sum(segment.size * segment.repeat for segment in layer.outputs)

    def record(_module: nn.Module, _inputs: object, output: object) -> None:
        if not isinstance(output, Tensor):
            return
        axis = 1 if output.dim() == 4 and output.shape[1] == outputs else output.dim() - 1
        if output.shape[axis] == outputs:
            rest = [place for place in range(1, output.dim()) if place != axis]
            into.append(output.mean(dim=rest) if rest else output.clone())

    return record


def response_features(responses: Floats, name: str = "response") -> tuple[list[str], Floats]:
    """What a neuron's answers [L, VIEWS * count] amount to: names, which begin with ``name``, and
    values [L, K].

    Mean, spread and sign of the answers to the clean inputs, how much noise moves them, and the
    first `RAW` answers themselves, in units of the spread.
    """
    views = np.clip(np.nan_to_num(responses), -LIMIT, LIMIT).reshape(len(responses), VIEWS, -1)
    clean = views[:, 0]
    mean, spread = clean.mean(axis=1), clean.std(axis=1)
    unit = spread + TINY
    centered = clean - mean[:, None]
    columns = {
        f"{name}_mean": mean,
        f"{name}_log_spread": np.log(unit),
        f"{name}_mean_units": np.clip(mean / unit, -20, 20),
        f"{name}_positive": (clean > 0).mean(axis=1),
        f"{name}_skew": np.clip((centered**3).mean(axis=1) / unit**3, -10, 10),
    }
    for level, view in zip(NOISE, views.swapaxes(0, 1)[1:], strict=True):
        moved = np.sqrt(((view - clean) ** 2).mean(axis=1)) / unit
        columns[f"{name}_moved_{level:g}"] = np.log(np.clip(moved, TINY, 1 / TINY))
    for index in range(min(RAW, clean.shape[1])):
        columns[f"{name}_{index}"] = np.clip(centered[:, index] / unit, -10, 10)
    return list(columns), np.stack(list(columns.values()), axis=1).astype(np.float32)


def response_statistics(
    responses: Floats, layer_offsets: Longs, layer_starts: Longs, name: str = "probe"
) -> tuple[list[str], Floats]:
    """How networks as a whole answer: names, which begin with ``name``, and values [B, S].

    Of the outputs: confidence, entropy, margins, classes chosen, dimension, and how noise changes
    them. Of the hidden layers (first, middle, last, mean): dimension of the answers, share of
    neurons that are off, and what noise does.

    Args:
        responses: [L, VIEWS * count], ordered by network and layer; the last layer is the output.
        layer_offsets, layer_starts: as in `TokenFeatures`.
    """
    rows = []
    for network in range(len(layer_starts) - 1):
        layers = range(layer_starts[network], layer_starts[network + 1])
        answers = [responses[layer_offsets[i] : layer_offsets[i + 1]] for i in layers]
        answers = [np.clip(np.nan_to_num(a), -1e4, 1e4).astype(np.float64) for a in answers]
        answers = [a.reshape(len(a), VIEWS, -1) for a in answers]
        row = _output_statistics(answers[-1])
        hidden = np.array(
            [_layer_statistics(a) for a in answers[:-1]] or [_layer_statistics(answers[-1])]
        )
        places = {"first": hidden[0], "middle": hidden[len(hidden) // 2], "last": hidden[-1]}
        places["mean"] = hidden.mean(axis=0)
        for place, values in places.items():
            row |= {f"{place}_{name}": v for name, v in zip(_LAYER, values, strict=True)}
        rows.append(row)
    names = list(rows[0]) if rows else []
    values = np.array([[row[name] for name in names] for row in rows], dtype=np.float32)
    return [f"{name}_{column}" for column in names], values.reshape(len(rows), len(names))


_LAYER = (
    "dimension",
    "top",
    "off",
    *(f"moved_{level:g}" for level in NOISE),
    "correlation",
    "spread",
)


def _layer_statistics(views: Floats) -> list[float]:
    clean = views[:, 0]
    centered = clean - clean.mean(axis=1, keepdims=True)
    power = float((centered**2).sum()) + TINY**2
    share, entropy = _spectrum(centered)
    moved = [
        0.5 * np.log(float(((views[:, v] - clean) ** 2).sum()) / power + TINY)
        for v in range(1, VIEWS)
    ]
    unit = centered / (np.linalg.norm(centered, axis=0, keepdims=True) + TINY)
    gram = unit.T @ unit
    off = float((clean <= 0).all(axis=1).mean())
    spread = np.log(np.sqrt(power / clean.size))
    return [entropy, float(share[0]), off, *moved, float(np.abs(gram).mean()), float(spread)]


def _spectrum(centered: Floats) -> tuple[Floats, float]:
    """Shares of the singular values, largest first, and their entropy."""
    values = np.linalg.svd(centered, compute_uv=False)
    share = values / max(float(values.sum()), TINY)
    return share, float(-(share * np.log(np.maximum(share, TINY))).sum())


def _output_statistics(views: Floats) -> dict[str, float]:
    """Of the outputs [classes, VIEWS, count]."""
    logits = views[:, 0]
    chance, log_chance = _softmax(logits)
    classes = len(logits)
    entropy = -(chance * log_chance).sum(axis=0)
    ordered = np.sort(logits, axis=0)
    gap = ordered[-1] - ordered[-2] if classes > 1 else ordered[-1]
    spread = float(logits.std(axis=1).mean()) + TINY
    average = chance.mean(axis=1)
    chosen = np.bincount(logits.argmax(axis=0), minlength=classes)
    share, dimension = _spectrum(logits - logits.mean(axis=1, keepdims=True))
    row = {
        "entropy": float(entropy.mean()),
        "entropy_spread": float(entropy.std()),
        "confidence": float(chance.max(axis=0).mean()),
        "average_entropy": float(-(average * np.log(np.maximum(average, TINY))).sum()),
        "log_spread": float(np.log(spread)),
        "log_total_spread": float(np.log(logits.std() + TINY)),
        "log_bias": float(np.log(logits.mean(axis=1).std() + TINY)),
        "log_gap": float(np.log(gap.mean() + TINY)),
        "gap_units": float(gap.mean() / spread),
        "classes": float((chosen > 0).mean()),
        "favourite": float(chosen.max() / max(chosen.sum(), 1)),
        "dimension": dimension,
    }
    known = min(len(share), logits.shape[1] - 1)  # centred, the last of as many is rounding
    row |= {f"share{i}": float(share[i]) if i < known else 0.0 for i in range(9)}
    for level, view in zip(NOISE, views.swapaxes(0, 1)[1:], strict=True):
        other, log_other = _softmax(view)
        kl = float((chance * (log_chance - log_other)).sum(axis=0).mean())
        moved = float(np.linalg.norm(view - logits, axis=0).mean())
        row |= {
            f"flips_{level:g}": float((view.argmax(axis=0) != logits.argmax(axis=0)).mean()),
            f"log_moved_{level:g}": float(np.log(moved / spread + TINY)),
            f"log_kl_{level:g}": float(np.log(max(kl, 0) + TINY)),
            f"confidence_{level:g}": float(other.max(axis=0).mean()),
        }
    return row


def _softmax(logits: Floats) -> tuple[Floats, Floats]:
    shifted = logits - logits.max(axis=0, keepdims=True)
    log_chance = shifted - np.log(np.exp(shifted).sum(axis=0, keepdims=True))
    return np.exp(log_chance), log_chance
