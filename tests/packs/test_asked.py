"""What a task asks to be written, and what of it is judged."""

from __future__ import annotations

from typing import Any

import pytest
from support import tiny

from eaft_prune.config import HarnessSettings
from eaft_prune.core.types import UserError
from eaft_prune.packs.asked import decoding, judged
from eaft_prune.packs.tokenizer import TransformersTokenizer, load_tokenizer

PLAIN, CHAT = HarnessSettings(), HarnessSettings(chat_template=True)
TURN = (
    "<|channel|>analysis<|message|>Q: no end\nhere<|end|><|start|>assistant<|channel|>final"
    "<|message|>forty-two\nQ: next<|return|>"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TransformersTokenizer:
    return load_tokenizer(tiny.write_checkpoint(tmp_path_factory.mktemp("asked") / "model"))


def test_how_it_is_written(tokenizer: TransformersTokenizer) -> None:
    how = decoding("t", {"until": ["Q:"], "max_gen_toks": 7, "top_p": 1.0}, PLAIN, tokenizer)
    assert (how.max_new_tokens, how.seed) == (7, None)
    assert how.stops == ((tokenizer.eos,), tuple(tokenizer.encode(["Q:"])[0]))
    drawn = decoding("t", {"do_sample": True, "temperature": 0.5}, PLAIN, tokenizer)
    assert (drawn.max_new_tokens, drawn.seed, drawn.temperature) == (256, 0, 0.5)
    greedy = decoding("t", {"do_sample": False, "temperature": 0.5}, PLAIN, tokenizer)
    assert greedy.seed is None
    # under a template a thought may hold what ends an answer
    texts = [
        tokenizer.inner.decode(list(stop))
        for stop in decoding("t", {"until": "Q:"}, CHAT, tokenizer).stops
    ]
    assert "<|return|>" in texts
    assert "Q:" not in texts


@pytest.mark.parametrize("asked", [{"top_p": 0.9}, {"num_beams": 4}, {"grammar": "x"}])
def test_what_is_not_done_is_said(tokenizer: TransformersTokenizer, asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(UserError, match=f"quiz asks for generation_kwargs {name}"):
        decoding("quiz", asked, PLAIN, tokenizer)


def test_what_is_judged(tokenizer: TransformersTokenizer) -> None:
    ids = tokenizer.encode([TURN, "an answer\nQ: next"])
    assert judged(ids[1], {"until": ["Q:", "\n\n"]}, PLAIN, tokenizer) == "an answer\n"
    assert judged(ids[1], {}, PLAIN, tokenizer) == "an answer\nQ: next"
    assert judged(ids[0], {"until": "\nQ:"}, CHAT, tokenizer) == "forty-two"
    assert judged(ids[1], {"until": "\n"}, CHAT, tokenizer) == "an answer"  # no final message
