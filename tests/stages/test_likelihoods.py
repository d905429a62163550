"""Continuations scored in a padded batch against the model alone on each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from support.engines import options

from eaft_prune.checkpoints.read import open_model
from eaft_prune.core.harness import Continuations
from eaft_prune.engines.loading import load_files
from eaft_prune.stages.likelihoods import likelihoods


@pytest.mark.slow
def test_each_is_as_if_alone(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "model")
    engine = load_files(open_model(checkpoint), options(device="cpu", batch_tokens=64))
    model = tiny.eager_model(checkpoint)
    rng = np.random.default_rng(3)
    lists = [rng.integers(1, 200, n).tolist() for n in (9, 2, 40, 5)]
    with torch.no_grad():  # one that greedy decoding writes
        for _ in range(3):
            lists[3].append(int(model(torch.tensor([lists[3]])).logits[0, -1].argmax()))
    scored = [4, 1, 17, 3]
    told: list[int] = []
    found = likelihoods(engine, Continuations(lists, scored), told.append)
    assert sum(told) == 4 * 40
    for ids, n, logp, greedy in zip(lists, scored, found.logp_R, found.greedy_R, strict=True):
        with torch.no_grad():
            ln_p = model(torch.tensor([ids])).logits[0, -n - 1 : -1].double().log_softmax(-1)
        assert logp == pytest.approx(float(ln_p[range(n), ids[-n:]].sum()), abs=1e-4)
        assert greedy == (ln_p.argmax(-1).tolist() == ids[-n:])
    assert found.greedy_R.tolist()[3]
    assert not found.greedy_R.all()
