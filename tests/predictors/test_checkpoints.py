"""A checkpoint comes back exactly, or it is another fit's or damaged and does not come back."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightnet.predictors.checkpoints import FitState, read_checkpoint, save_checkpoint

FINITE = st.floats(allow_nan=False, width=32)


def begin(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return module, optimizer


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@settings(max_examples=20, deadline=None)
@given(
    epoch=st.integers(0, 1000),
    value=FINITE,
    history=st.lists(st.dictionaries(st.text(max_size=5), FINITE, max_size=3), max_size=4),
)
def test_it_comes_back_exactly(epoch: int, value: float, history: list[dict[str, float]]) -> None:
    module, optimizer = begin(0)
    best = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = FitState(epoch, epoch - 1, value, 3 * epoch, history, best, best)
    other, its_optimizer = begin(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        save_checkpoint(path, "mine", state, module, optimizer)
        assert read_checkpoint(path, "another's", other, its_optimizer) is None
        found = read_checkpoint(path, "mine", other, its_optimizer)
    assert found is not None
    assert (found.epoch, found.best_value, found.history) == (epoch, value, history)
    assert equal(found.best, best)
    assert equal(other.state_dict(), module.state_dict())
    for ours, theirs in zip(
        optimizer.state_dict()["state"].values(),
        its_optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert equal(ours, theirs)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_one_that_is_damaged_anywhere_is_not_taken(data: st.DataObject) -> None:
    module, optimizer = begin(0)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        log = logging.getLogger("weightnet.predictors.checkpoints")
        patch.setattr(log, "warning", lambda text, *values: said.append(text % values))
        path = Path(folder) / "checkpoint"
        save_checkpoint(path, "mine", FitState(epoch=3), module, optimizer)
        whole = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            del whole[place:]
        else:
            whole[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(whole)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        found = read_checkpoint(path, "mine", module, optimizer)
        assert equal(module.state_dict(), before)
        if found is None:
            assert f"{path} is damaged" in said[0]
        else:  # a bit in what means nothing, such as the space after the header
            assert found == FitState(epoch=3)
