"""packs.format=messages: what a model's own chat template writes, and what of it is scored."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import tiny

from eaft_prune.config import PacksSettings
from eaft_prune.core.types import UserError
from eaft_prune.packs.chat import said, written
from eaft_prune.packs.conversations import messages_of
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.tokenizer import TransformersTokenizer, load_tokenizer
from eaft_prune.stages.pack import BlockRequest, pack

DEMO = Path(str(files("eaft_prune") / "demo"))
# as Qwen3's: thoughts of earlier turns are not written, those of the last always are
LATE = r"""
{%- set last = namespace(user=-1) %}
{%- for m in messages %}
  {%- if m.role == "user" %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}{{- "<|im_start|>system\n" + (tools | tojson) + "<|im_end|>\n" }}{% endif %}
{%- for m in messages %}
  {%- if m.role == "tool" %}
    {{- "<|im_start|>user\n<result>" + m.content + "</result><|im_end|>\n" }}
  {%- elif m.role != "assistant" %}
    {{- "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
  {%- else %}
    {{- "<|im_start|>assistant\n" }}
    {%- if loop.index0 > last.user %}
      {{- "<think>\n" + (m.reasoning_content or "") + "\n</think>\n\n" }}
    {%- endif %}
    {{- m.content.strip() }}
    {%- for call in m.tool_calls or [] %}
      {{- "<call>" + call.function.name + " " + (call.function.arguments | tojson) + "</call>" }}
    {%- endfor %}
    {{- "<|im_end|>\n" }}
  {%- endif %}
{%- endfor %}"""
# the same words, marked; and as many templates, no place for thoughts, calls or developers
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "seven"},
    {"role": "assistant", "reasoning_content": "early thought", "content": "  nine é\n"},
    {"role": "user", "content": "nine é"},
    {
        "role": "assistant",
        "content": "",
        "thinking": "late thought",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}],
    },
    {"role": "tool", "content": "late thought"},
    {"role": "assistant", "content": "equals"},
]


def tokenizer(path: Path, template: str) -> TransformersTokenizer:
    tiny.write_tokenizer(path, tiny.CHATML)
    (path / "chat_template.jinja").write_text(template)
    return load_tokenizer(path)


def scored(of: TransformersTokenizer, messages: Any, tools: Any = None) -> list[str]:
    """The runs of scored tokens of a conversation, as text."""
    text, spans = said(of, messages, tools)
    ids, mask = np.array(of.encode([text])[0]), of.scored(text, spans)
    cuts = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    return [of.inner.decode(ids[begin:end]) for begin, end in cuts]


def test_an_assistants_words_are_scored_wherever_the_template_puts_them(tmp_path: Path) -> None:
    """Also said by others: what is meant is the place, not the words."""
    assert scored(tokenizer(tmp_path, LATE), TALK) == [
        "nine é",
        'late thought\n</think>\n\n<call>f {"x": "é',
        "equals",
    ]


def test_marks_of_the_template_and_words_replaced_are_the_same_tokens(tmp_path: Path) -> None:
    """transformers' own mask is the oracle, special tokens aside."""
    for name in ("marked", "bare"):
        (tmp_path / name).mkdir()
    marked = tokenizer(tmp_path / "marked", PLAIN)
    bare = PLAIN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    unmarked = tokenizer(tmp_path / "bare", bare)
    talk = [{"role": m["role"], "content": m["content"] + "!"} for m in TALK[:3]] + [TALK[5]]
    truth = marked.inner.apply_chat_template(
        talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    for own in (marked, unmarked):
        text, spans = said(own, talk)
        assert own.encode([text])[0] == truth["input_ids"]
        assert own.scored(text, spans).tolist() == [bool(v) for v in truth["assistant_masks"]]
    assert 0 < sum(truth["assistant_masks"]) < len(truth["input_ids"])


def test_what_a_template_has_no_place_for_is_written_where_it_has(tmp_path: Path) -> None:
    """Calls as lines of JSON, tools as users, developers as the system or in the user's message."""
    own = tokenizer(tmp_path, PLAIN)
    talk = [{"role": "developer", "content": "be"}, {"role": "developer", "content": "brief"}]
    text, _ = said(own, [*talk, *TALK])
    assert text.startswith("<|im_start|>system\nbe\n\nbrief<|im_end|>\n<|im_start|>user\nseven<")
    assert scored(own, TALK)[1] == '{"name": "f", "arguments": {"x": "é"}}'
    assert "<|im_start|>user\nlate thought<|im_end|>" in text
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    text, _ = said(tokenizer(tmp_path, refusing), [*talk, *TALK])
    assert text.startswith("<|im_start|>user\nbe\n\nbrief\n\nseven<|im_end|>")


def test_arguments_are_text_for_templates_that_only_join_texts(tmp_path: Path) -> None:
    joining = LATE.replace("(call.function.arguments | tojson)", "call.function.arguments")
    assert said(tokenizer(tmp_path, LATE), TALK)[0] == said(tokenizer(tmp_path, joining), TALK)[0]


def test_the_shipped_packs_are_the_same_blocks_for_a_model_that_speaks_harmony() -> None:
    """Every row's text as it is, and of it the token ids and scored positions."""
    own, found = load_tokenizer(DEMO / "checkpoint"), []
    for path in sorted((DEMO / "packs").glob("*.parquet")):
        file = PackFile("p", path, "text")
        rows = [(text, None) for text in pq.read_table(path)["text"].to_pylist()]
        assert list(written(file, "messages", lambda: own)) == rows
    for form in ("harmony", "messages"):
        settings = PacksSettings(name="n", files={"p": str(path)}, format=form, split="none")
        texts = {"p": [text for text, _ in rows]}
        request = BlockRequest("p", "eval", 512, 8, 0, "")
        found.append(pack(settings, request, texts, own).blocks)
    assert found[0].token_digest == found[1].token_digest


def test_harmony_read_as_messages_loses_nothing_that_an_assistant_said(tmp_path: Path) -> None:
    """What read_conversation scores of the shipped packs is what another model's template gets."""
    harmony = load_tokenizer(DEMO / "checkpoint")
    other = tokenizer(tmp_path, LATE)
    texts = pq.read_table(DEMO / "packs" / "tool_agentic.parquet")["text"].to_pylist()[::7]
    for text in [*texts, *tiny.rows(2), "<|start|>user<|message|>a<|end|><|start|>assist"]:
        words: list[str] = []
        for message in messages_of(text):
            if message["role"] == "assistant":
                words += filter(None, [message.get("reasoning_content"), message["content"]])
                calls = message.get("tool_calls", [])
                words += [json.dumps(c["function"]["arguments"], ensure_ascii=False) for c in calls]
        spoken = text.split("<|start|>assistant")[1:]
        parts = [p.split("<|message|>")[1].split("<|")[0] for p in spoken if "<|message|>" in p]
        assert words == [json.dumps(json.loads(p)) if p[0] == "{" else p for p in parts] or (
            words == parts
        )
        assert len(scored(other, messages_of(text))) > 0 or not parts
    assert harmony.speaks_harmony
    assert not other.speaks_harmony


def test_tools_beside_messages_are_the_templates(tmp_path: Path) -> None:
    own, path = tokenizer(tmp_path, LATE), tmp_path / "p.parquet"
    schema = [{"name": "f", "description": "é"}]
    table = {"messages": [TALK[4:], TALK[4:]], "tools": [json.dumps(schema), None]}
    pq.write_table(pa.table(table), path)
    first, second = (
        t for t, _ in written(PackFile("p", path, "messages"), "messages", lambda: own)
    )
    assert (
        first == f"<|im_start|>system\n{json.dumps(schema, ensure_ascii=False)}<|im_end|>\n{second}"
    )
    pq.write_table(pa.table({**table, "tools": ["7", None]}), path)
    with pytest.raises(UserError, match="row 0: tools holds '7', no list of JSON schemas"):
        list(written(PackFile("p", path, "messages"), "messages", lambda: own))


@pytest.mark.parametrize(
    "text", ["plain", "<|start|>user<|message|>a<|end|>b", "<|start|>a<|end|>"]
)
def test_text_that_is_no_harmony_is_refused_with_its_row(tmp_path: Path, text: str) -> None:
    own, path = tokenizer(tmp_path, PLAIN), tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": [*tiny.rows(1), text]}), path)
    with pytest.raises(UserError, match=r"pack p: .*row 1: no harmony message at character \d+"):
        list(written(PackFile("p", path, "text"), "messages", lambda: own))


OPENS = PLAIN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
LAST = "{{ messages[-1].content }}{% if add_generation_prompt %}{{ '>' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "opened", "head"),
    [
        (OPENS, "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n"),
        (LATE, "", "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_where_an_answer_begins_is_asked_of_the_template(
    tmp_path: Path, template: str, opened: str, head: str
) -> None:
    assert tokenizer(tmp_path, template).turn_begins == (opened, head)


def test_of_harmony_an_answer_begins_behind_its_header() -> None:
    demo = load_tokenizer(DEMO / "checkpoint")
    assert demo.turn_begins == ("<|start|>assistant", "<|start|>assistant<|message|>")


def test_a_template_that_rewrites_the_question_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="otherwise once it is answered"):
        _ = tokenizer(tmp_path, LAST).turn_begins
