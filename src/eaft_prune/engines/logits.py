"""From last hidden states to logits, by the model's own code: scalings and caps are in it."""

from __future__ import annotations

from typing import Any

import torch


class PlainHead:
    """Logits of a model whose output embedding is all that comes after its layers."""

    def __init__(self, model: Any) -> None:
        self._head = model.get_output_embeddings()

    @property
    def vocab(self) -> int:
        """How many logits a position has."""
        return int(self._head.weight.shape[0])

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden_TH)
        return logits


class OwnHead:
    """Logits [T, V] of hidden states [T, H], as the model makes them after its layers.

    What its body returns is put in the place of running it, so that everything behind it, whatever
    it is, runs on the rows that are asked for and no others.
    """

    def __init__(self, model: Any, body_output: Any) -> None:
        self._model, self._output = model, body_output

    @property
    def vocab(self) -> int:
        """How many logits a position has."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        body, output = self._model.base_model, self._output
        whole = output.last_hidden_state
        output.last_hidden_state = hidden_TH[None]
        body.forward = lambda *args, **kwargs: output
        try:
            ids = torch.zeros(1, len(hidden_TH), dtype=torch.long, device=hidden_TH.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        finally:
            del body.forward
            output.last_hidden_state = whole
        return logits[0]
