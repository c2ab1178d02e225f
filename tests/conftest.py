"""Tests compute with one thread: torch's threads wait for each other, many times longer than they
compute where other work shares the cores."""

import torch

torch.set_num_threads(1)
