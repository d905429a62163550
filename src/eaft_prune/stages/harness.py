"""Tasks of lm-evaluation-harness: loaded, put to a model, judged; nothing else imports it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api import task as harness_task
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from eaft_prune.config import HarnessSettings, nearest, resolve_path
from eaft_prune.core.digests import digest
from eaft_prune.core.generation import Written
from eaft_prune.core.harness import Answers, Continuations, Likelihoods, Openings
from eaft_prune.core.types import UserError
from eaft_prune.packs.asked import decoding, judged, numbers
from eaft_prune.packs.tokenizer import TransformersTokenizer

VERSION = 1
_SEED = 1234  # of examples: the harness's own


@dataclass(frozen=True)
class Asker:
    """Who answers batches: a model behind a store."""

    score: Callable[[Sequence[Continuations]], Sequence[Likelihoods]]
    write: Callable[[Sequence[Openings]], Sequence[Written]]


@dataclass(frozen=True)
class Task:
    """What one name of eval.tasks stands for: a task, or all of a group."""

    name: str
    parts: Mapping[str, Any]
    settings: HarnessSettings
    tokenizer: TransformersTokenizer

    @property
    def digest(self) -> str:
        """Of what answers depend on beside the model: questions, targets, how they are judged.

        The questions are built for it as the harness builds them.
        """
        model = _Model(self, None)
        found: dict[str, Any] = {"harness": version("lm_eval"), **self.settings.model_dump()}
        del found["include"]  # a place
        scored = any(part.OUTPUT_TYPE != "generate_until" for part in self.parts.values())
        if self.settings.chat_template and scored:
            found["turn begins"] = list(self.tokenizer.turn_begins)
        with _alone(self.parts):
            for name, part in self.parts.items():
                part.build_all_requests(
                    limit=self.settings.limit,
                    rank=0,
                    world_size=1,
                    apply_chat_template=self.settings.chat_template,
                    fewshot_as_multiturn=self.settings.chat_template,
                    chat_template=model.apply_chat_template,
                    tokenizer_name=model.tokenizer_name,
                )
                asked = [
                    [one.request_type, one.arguments, one.doc, one.repeats]
                    for one in part.instances
                ]
                found[f"task {name}"] = json.dumps([part.dump_config(), asked], default=str)
        return digest(found)


def load(name: str, settings: HarnessSettings, tokenizer: TransformersTokenizer) -> Task:
    """A task, or all of a group, with its data.

    Raises UserError where there is none of that name, its data cannot be had, or it asks for what
    is not done here.
    """
    manager = _manager_with(name, settings)
    try:
        with _alone({}):
            parts = manager.load([name])["tasks"]
    except Exception as error:  # whatever a YAML file, its functions and its data raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"eval.tasks: {name} cannot be loaded: {first}") from error
    for part in parts.values():
        _check(name, part, settings, tokenizer)
        if settings.num_fewshot is not None and part.get_config("num_fewshot") != 0:
            part.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif part.get_config("num_fewshot") is None:
            part.set_config(key="num_fewshot", value=0)
    return Task(name, parts, settings, tokenizer)


def _check(
    name: str, part: Any, settings: HarnessSettings, tokenizer: TransformersTokenizer
) -> None:
    """Raise UserError where a task asks for what is not done here."""
    if getattr(part, "UNSAFE_CODE", False):
        raise UserError(
            f"eval.tasks: {name} runs code that the model wrote, on this machine: leave it out"
        )
    if part.OUTPUT_TYPE == "loglikelihood_rolling":
        raise UserError(
            f"eval.tasks: {name} measures the perplexity of whole texts, as packs do: leave it out"
        )
    if part.OUTPUT_TYPE == "generate_until":
        decoding(name, part.get_config("generation_kwargs") or {}, settings, tokenizer)
    if settings.chat_template and part.get_config("gen_prefix"):
        raise UserError(
            f"eval.tasks: {name} begins the answer itself (gen_prefix), which "
            "harness.chat_template = true cannot do: leave one out"
        )


def answers(task: Task, asker: Asker) -> Answers:
    """Every sample of the task as the model behind `asker` answers it, judged by the harness."""
    chat = task.settings.chat_template
    with _alone(task.parts):
        found = evaluate(
            _Model(task, asker),
            {"tasks": dict(task.parts)},
            limit=task.settings.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    ids: list[str] = []
    said: list[str] = []
    log: list[str] = []
    scores: list[dict[str, list[float]]] = []
    others: dict[str, None] = {}
    for name, part in task.parts.items():
        kept = found["samples"][name]
        own = [one for one in kept if one["filter"] == kept[0]["filter"]]
        ids += [f"{name} {s['doc_hash']} {s['prompt_hash']} {s['target_hash']}" for s in own]
        said += [json.dumps(one["resps"], default=str) for one in own]
        log += [json.dumps(one, default=str) for one in kept]
        good, rest = numbers(kept, part.higher_is_better())
        scores.append(good)
        others |= dict.fromkeys(rest)
    shared = [name for name in scores[0] if all(name in good for good in scores)]
    if not shared:
        raise UserError(
            f"eval.tasks: {task.name} has no metric of which every sample has a number, more being "
            f"better (it has {', '.join(others)}): ask for tasks that have one"
        )
    others |= dict.fromkeys(n for good in scores for n in good if n not in shared)
    joined = {name: [x for good in scores for x in good[name]] for name in shared}
    return Answers(tuple(ids), tuple(said), joined, tuple(others), tuple(log))


class _Model(TemplateLM):  # type: ignore[misc]
    """A model as the harness knows it: texts in, log-likelihoods and texts out."""

    def __init__(self, task: Task, asker: Asker | None) -> None:
        super().__init__()
        self._task, self._asker, self._tokenizer = task, asker, task.tokenizer

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.path)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        begin = self._tokenizer.inner.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        own = not self._task.settings.chat_template  # which writes what begins a text
        special = own if add_special_tokens is None else add_special_tokens
        return list(self._tokenizer.inner(string, add_special_tokens=special)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._tokenizer.render(chat_history, answering=True)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        if self._task.settings.chat_template:
            requests = [replace(one, arguments=self._in_a_turn(*one.args)) for one in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _in_a_turn(self, context: str, continuation: str) -> tuple[str, str]:
        """Behind what the template writes before an answer's text, where a context is a chat."""
        open_, head = self._tokenizer.turn_begins
        chat = context.endswith(open_)
        return context.removesuffix(open_) + head if chat else context, continuation

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        assert self._asker is not None
        lists = [before + asked for _, before, asked in requests]
        order, size = _by_length(lists), self._task.settings.batch
        groups = [order[first : first + size] for first in range(0, len(order), size)]
        batches = [
            Continuations([lists[i] for i in some], [len(requests[i][2]) for i in some])
            for some in groups
        ]
        found: dict[int, tuple[float, bool]] = {}
        for some, one in zip(groups, self._asker.score(batches), strict=True):
            pairs = zip(one.logp_R.tolist(), one.greedy_R.tolist(), strict=True)
            found |= dict(zip(some, pairs, strict=True))
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError  # such tasks are refused

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        assert self._asker is not None
        task = self._task
        lists = [self.tok_encode(one.args[0]) for one in requests]
        hows = [decoding(task.name, one.args[1], task.settings, task.tokenizer) for one in requests]
        size, batches, groups = task.settings.batch, [], []
        for how in dict.fromkeys(hows):
            mine = [i for i in _by_length(lists) if hows[i] == how]
            for first in range(0, len(mine), size):
                some = mine[first : first + size]
                groups.append(some)
                batches.append(Openings([lists[i] for i in some], how, first))
        found: dict[int, str] = {}
        for some, written in zip(groups, self._asker.write(batches), strict=True):
            for i, ids in zip(some, written.lists, strict=True):
                found[i] = judged(ids, requests[i].args[1], task.settings, task.tokenizer)
        return [found[i] for i in range(len(requests))]


def _by_length(lists: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(lists)), key=lambda i: len(lists[i]))  # little padding in a batch


def _manager_with(name: str, settings: HarnessSettings) -> TaskManager:
    folder = None if settings.include is None else resolve_path(settings.include)
    if folder is not None and not folder.is_dir():
        raise UserError(f"harness.include = {settings.include!r}: {folder} is no folder")
    if folder is not None and name in _manager(folder, False).all_tasks:
        return _manager(folder, False)
    manager = _manager(folder, True)
    if name not in manager.all_tasks:
        close = nearest(name, manager.all_tasks)
        hint = (
            f"; did you mean {close!r}?" if close else "; give harness.include=FOLDER for your own"
        )
        raise UserError(f"eval.tasks names {name!r}, which is no task of the harness{hint}")
    return manager


@cache
def _manager(folder: Path | None, all_of_them: bool) -> TaskManager:
    """With the harness's own tasks 15,000 files are read: 11 s."""
    return TaskManager(include_path=folder, include_defaults=all_of_them)


@contextmanager
def _alone(parts: Mapping[str, Any]) -> Iterator[None]:
    """With the harness's seeds, as tasks shuffle choices, and without its bars and lines."""
    numbers, bar = (random.getstate(), np.random.get_state()), harness_task.tqdm
    logger, bars = logging.getLogger("lm_eval"), not datasets.utils.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    harness_task.tqdm = partial(bar, disable=True)
    random.seed(0)
    np.random.seed(_SEED)
    for part in parts.values():
        part.set_fewshot_seed(seed=_SEED)
    try:
        yield
    finally:
        random.setstate(numbers[0])
        np.random.set_state(numbers[1])
        logger.setLevel(level)
        harness_task.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
