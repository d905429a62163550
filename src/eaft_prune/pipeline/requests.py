"""Every request for blocks, and the setting that says how many."""

from __future__ import annotations

from eaft_prune.config import Experiment
from eaft_prune.core.types import UNION
from eaft_prune.stages.pack import BlockRequest


def profiling(experiment: Experiment, seed: int | None) -> BlockRequest:
    """The blocks whose routing is traced, drawn with this seed."""
    settings = experiment.profile
    return BlockRequest(
        UNION,
        "profile",
        settings.seq_len,
        settings.num_blocks,
        seed,
        "profile.num_blocks",
        "profile.seq_len",
    )


def calibration(experiment: Experiment) -> BlockRequest:
    """The blocks that losses are measured on by masking experts."""
    settings = experiment.marginal
    return BlockRequest(
        UNION, "profile", settings.seq_len, settings.num_blocks, settings.seed,
        "marginal.num_blocks", "marginal.seq_len",
    )  # fmt: skip


def scoring(experiment: Experiment) -> BlockRequest:
    """The blocks that scores come from: those traced, or those that losses are measured on."""
    if experiment.pruning.measured:
        return calibration(experiment)
    return profiling(experiment, experiment.profile.seed)


def compensating(experiment: Experiment) -> BlockRequest:
    """The blocks that changed weights are fitted to."""
    settings = experiment.compensation
    return BlockRequest(
        settings.pack, "profile", experiment.profile.seq_len, settings.num_blocks, settings.seed,
        "compensation.num_blocks", "profile.seq_len",
    )  # fmt: skip


def evaluating(experiment: Experiment) -> list[BlockRequest]:
    """The blocks that base and candidates are evaluated on, pack by pack at each length."""
    settings = experiment.eval
    return [
        BlockRequest(
            pack, "eval", seq_len, settings.blocks_of(pack, seq_len), settings.seed,
            "eval.num_blocks", "eval.seq_lens",
        )
        for seq_len in settings.seq_lens
        for pack in experiment.eval_packs
    ]  # fmt: skip


def searching(experiment: Experiment) -> list[BlockRequest]:
    """The blocks that trials are evaluated on, one request a replicate."""
    settings = experiment.search
    assert settings is not None, "config requires search settings for task=search"
    return [
        BlockRequest(
            UNION,
            "profile",
            settings.seq_len,
            settings.num_blocks,
            seed,
            "search.num_blocks",
            "search.seq_len",
        )
        for seed in settings.seeds
    ]


def frontier_search(experiment: Experiment) -> BlockRequest:
    """The blocks that sizes are tried on."""
    settings = experiment.frontier
    assert settings is not None, "config requires frontier settings for task=frontier"
    return BlockRequest(
        experiment.gate.pack,
        "profile",
        settings.seq_len or experiment.gate.seq_lens[0],
        settings.num_blocks,
        settings.seed,
        "frontier.num_blocks",
        "frontier.seq_len",
    )


def comparing_experts(experiment: Experiment) -> BlockRequest:
    """The one block that task=expert_math runs."""
    settings = experiment.profile
    shorter = "profile.seq_len"
    return BlockRequest(UNION, "profile", settings.seq_len, 1, settings.seed, shorter, shorter)
