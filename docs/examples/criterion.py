"""A criterion: how much of its layer's gate an expert takes where the model is right."""

import numpy as np

from eaft_prune.core.types import Trace


def gate_where_right(trace: Trace) -> np.ndarray:
    """Scores [layers, experts], higher = keep: sum of router weights where p > 0.5."""
    right = trace[trace.scores.p_T > 0.5]
    scores = np.zeros((trace.n_layers, trace.n_experts))
    for layer in range(trace.n_layers):
        np.add.at(scores[layer], right.experts_TLK[:, layer], right.weights_TLK[:, layer])
    return scores
