"""How far the pruned model's predictions are from the unpruned one's."""

from __future__ import annotations

import torch

from eaft_prune.engines.head import Head
from eaft_prune.repair.streams import Streams

_BYTES = 1 << 30  # of logits held at once


@torch.inference_mode()
def distance(streams: Streams, chosen_T: torch.Tensor) -> float:
    """Mean over chosen scored tokens of KL(unpruned || pruned) of the next token, nats.

    Of streams that have been through all layers.
    """
    model = streams.engine.model
    head, norm = streams.head, model.base_model.norm
    last = next(model.get_output_embeddings().parameters()).device
    rows_at_once = max(1, _BYTES // (4 * head.vocab))
    total, first = 0.0, 0
    for number, rows in enumerate(streams.predictors):
        chosen = chosen_T[first : first + len(rows)].to(rows.device)
        first += len(rows)
        for part in torch.split(rows[chosen], rows_at_once):
            base, pruned = (
                _log_probabilities(head, norm, stream[number], part.to(streams.place), last)
                for stream in (streams.unpruned, streams.pruned)
            )
            total += float((base.exp() * (base - pruned)).sum(dtype=torch.float64))
    return total / int(chosen_T.sum())


def _log_probabilities(
    head: Head,
    norm: torch.nn.Module,
    stream: torch.Tensor,
    rows: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    hidden = norm(stream.flatten(0, 1)[rows].to(next(norm.parameters()).device))
    return torch.log_softmax(head(hidden.to(device)).float(), -1)
