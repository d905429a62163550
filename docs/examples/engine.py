"""An engine: every token is as likely as it is often in the blocks that are scored."""

from collections import Counter

import numpy as np

from eaft_prune.core.types import TokenScores
from eaft_prune.engines.base import EngineKind


class Unigram:
    def __init__(self, conditions):
        self.conditions = conditions

    def score(self, blocks, on_tokens):
        counts, (block_T, where_T) = Counter(blocks.ids_BS.flat), np.nonzero(blocks.scored_BS)
        p_T = np.array([counts[i] for i in blocks.ids_BS[block_T, where_T]]) / blocks.ids_BS.size
        on_tokens(blocks.ids_BS.size)
        return TokenScores(np.log(p_T), np.ones(len(p_T)), block_T)


ENGINE = EngineKind(
    name="unigram",
    key=lambda options: {"engine": "unigram", "version": 1},
    conditions=lambda options, top_k: {"engine": "unigram"},
    open=lambda options, files, top_k, log: Unigram({"engine": "unigram"}),
)
