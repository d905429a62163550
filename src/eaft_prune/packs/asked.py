"""How a task of lm-evaluation-harness wants answers written, and what of them is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from eaft_prune.config import HarnessSettings
from eaft_prune.core.generation import Decoding
from eaft_prune.core.types import UserError
from eaft_prune.packs.tokenizer import TransformersTokenizer

_FINAL = "<|channel|>final<|message|>"
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = ("until", "do_sample", "temperature", *_LENGTHS)
_NEUTRAL: Mapping[str, Sequence[Any]] = {"top_p": (1,), "top_k": (0, -1), "num_beams": (1,)}

Asked = Mapping[str, Any]  # generation_kwargs


def decoding(
    task: str, asked: Asked, settings: HarnessSettings, tokenizer: TransformersTokenizer
) -> Decoding:
    """How the task wants it written; raises UserError where it asks for what is not done here."""
    for name, value in asked.items():
        if name not in _KNOWN and value is not None and value not in _NEUTRAL.get(name, ()):
            raise UserError(
                f"eval.tasks: {task} asks for generation_kwargs {name} = {value!r}, which is not "
                f"done here (known: {', '.join(_KNOWN)}): leave it out, or write a task without"
            )
    lengths = [int(asked[name]) for name in _LENGTHS if asked.get(name) is not None]
    length = lengths[0] if lengths else settings.max_new_tokens
    # an end saves tokens: where an answer ends is decided on its text
    ends = ["<|return|>", "<|call|>"] if settings.chat_template else _until(asked)
    ids = [tuple(some) for some in tokenizer.encode(ends)] if ends else []
    stops = tuple(dict.fromkeys([(tokenizer.eos,), *(some for some in ids if some)]))
    temperature = float(asked.get("temperature") or 0.0)
    if temperature > 0 and asked.get("do_sample") is not False:
        return Decoding(length, stops, settings.seed, temperature)
    return Decoding(length, stops)


def judged(
    ids: Sequence[int], asked: Asked, settings: HarnessSettings, tokenizer: TransformersTokenizer
) -> str:
    """The answer up to where the task ends it; of harmony, under a template, the final message."""
    text = str(tokenizer.inner.decode(ids, skip_special_tokens=True))
    if settings.chat_template:
        _, final, rest = tokenizer.inner.decode(ids).rpartition(_FINAL)
        text = rest.split("<|")[0] if final else text
    for end in _until(asked):
        text = text.split(end)[0]
    return text


def numbers(
    samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool | None]
) -> tuple[dict[str, list[float]], list[str]]:
    """Metrics of which every sample has a number, more being better, by filter; and the others."""
    found: dict[str, list[Any]] = {}
    for one in samples:
        for metric in one["metrics"]:
            name = metric if one["filter"] == "none" else f"{metric}, {one['filter']}"
            found.setdefault(name, []).append(one[metric])
    good = {
        name: [float(value) for value in values]
        for name, values in found.items()
        if better.get(name.split(",")[0]) and all(isinstance(v, Real) for v in values)
    }
    return good, [name for name in found if name not in good]


def _until(asked: Asked) -> list[str]:
    until = asked.get("until") or []
    return [until] if isinstance(until, str) else [end for end in until if end]
