"""What carries a prediction: how much each property reads each layer of a network.

The sanity check is a WeightNet with the same shape and random weights (Adebayo et al. 2018,
https://arxiv.org/abs/1810.03292): a map that looks the same for both would explain nothing.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from weightnet.compute import default_device
from weightnet.predictors.fitting import seeded
from weightnet.predictors.interface import Predictor
from weightnet.predictors.learned import ModulePredictor
from weightnet.predictors.weightnet import TokenBatch, WeightNet
from weightnet.tokens import Networks

DEPTHS = 8
IMPORTANCE = ["run", "family", "model", "depth", "property", "importance"]


def layer_importance(predictor: Predictor, networks: Networks) -> pd.DataFrame:
    """The reading weights of a fitted WeightNet, and of a random one, over relative depth.

    Returns:
        Rows of run, family, property, model (``trained`` or ``randomized``), depth (the middle of
        one of 8 equal parts of the way from the first layer, 0, to the last, 1) and importance
        (the share of the property's reading weights that lies there).

    Raises:
        ValueError: if ``predictor`` is no WeightNet.
    """
    if not isinstance(predictor, ModulePredictor) or not isinstance(
        predictor.modules[0], WeightNet
    ):
        raise ValueError(f"importance must be asked of a WeightNet, however: {predictor.name}")
    with seeded(predictor.seed, "random importance"):
        random = predictor.reader.module(len(predictor.properties))
        assert isinstance(random, WeightNet)
    models = {"trained": predictor.modules[0], "randomized": random.eval()}
    batches = predictor.reader.batches(networks, training=False)
    device = default_device()
    parts = []
    for label, module in models.items():
        module.to(device)
        for indices in batches.cut(torch.arange(batches.count), predictor.fit_config):
            with torch.inference_mode():
                batch = batches.collate(indices).to(device)
                assert isinstance(batch, TokenBatch)
                weights = module.layer_importance(batch).cpu()
            for network, table in zip(indices.tolist(), weights, strict=True):
                read = table[table.sum(dim=1) > 0].numpy()
                depth = np.arange(len(read)) / max(1, len(read) - 1)
                frame = pd.DataFrame(read, columns=list(predictor.properties))
                frame["depth"] = (np.minimum(depth * DEPTHS, DEPTHS - 1) // 1 + 0.5) / DEPTHS
                shares = frame.groupby("depth", as_index=False).sum()
                origin = networks.frame.iloc[network]
                shares["run"], shares["family"] = origin["run"], origin["family"]
                parts.append(shares.assign(model=label))
    return pd.concat(parts).melt(
        ["run", "family", "model", "depth"], var_name="property", value_name="importance"
    )
