"""Where and how widely to compute: settled by the environment, never by params."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The device that WEIGHTNET_DEVICE names, else CUDA if available, else the CPU.

    Raises:
        ValueError: if the variable names no device, or one that is not there.
    """
    name = os.environ.get("WEIGHTNET_DEVICE", "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"WEIGHTNET_DEVICE must name an available device such as cpu or cuda, "
            f"however: WEIGHTNET_DEVICE={name} ({reason})"
        ) from None
    return device


def default_jobs() -> int:
    """Worker processes: WEIGHTNET_JOBS, else one per core (one in all on a GPU).

    Raises:
        ValueError: if the variable is not a positive number.
    """
    text = os.environ.get("WEIGHTNET_JOBS", "")
    if text:
        if not text.isdigit() or int(text) < 1:
            raise ValueError(
                f"WEIGHTNET_JOBS must be a positive number, however: WEIGHTNET_JOBS={text!r}"
            )
        return int(text)
    return len(os.sched_getaffinity(0)) if default_device().type == "cpu" else 1
