"""Make the three demo packs, the tokenizer and the training tokens of the demo checkpoint.

    python tools/demo_data.py --data DIR --packs src/eaft_prune/demo/packs --out WORK

DIR holds reasoning.parquet, tools.parquet, general.parquet (columns id, messages, tools, source,
license) and docs.parquet (text, source, license). WORK gets tokenizer.json, tokens.npz (per domain
the token ids and the length of each row) and data.json (counts). Pack rows are drawn first; every
other row that has the text, a user message or an answer of a pack row is dropped before training,
and whole chapters of the documentation are held out of it. Packs are natural text alone: what a
generator writes a model never gets wrong, and the 15% of tokens it is surest of, among which
confident conflicts are looked for, would all be such.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from demo_agents import Tool, agent_conversation
from demo_reasoning import GYM, OWN, Message, final, gym_conversations, user
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = [
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
    "<|end|>", "<|message|>", "<|call|>",
]  # fmt: skip
# that of Qwen2, digits alone so that arithmetic is regular: llama.cpp knows it by that name
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NATURAL = ("codeio", "continued")  # nobody says twice what they say
PACKS = ("reasoning_style", "tool_agentic", "calib_prompt")
# skills that are trained but that no pack asks for, as a general model has many
TRAIN_ONLY = {
    "brackets", "order_puzzle", "sort_words", "count_letters", "caesar_cipher", "spell_backward",
    "gsm_symbolic",
}  # fmt: skip
# pack -> rows per domain, or per source of continued documentation
QUOTAS: dict[str, dict[str, int]] = {
    "reasoning_style": {"codeio": 400, "python3.11-doc": 250, "rust-std-api": 60},
    "tool_agentic": {"bfcl": 300, "sqlite3-doc": 300, "rust-std-api": 60},
    "calib_prompt": {
        "python3.11-doc": 250, "sqlite3-doc": 200, "postgresql-15-doc": 130, "rust-std-api": 60,
        "rust-books": 60,
    },
}  # fmt: skip
HELD_OUT = 12  # every so many-th chapter of the documentation is not trained on
CONTINUE = "Continue this text:\n\n"
PIECE = (700, 1600)  # characters of documentation that are one conversation
ROWS = (6000, 4000, 30000)  # own and gym of each kind, agent in all
SECOND_PROBLEM = 0.4  # part of the own reasoning rows that go on with another problem
DOC_SHARE = 0.6  # part of the documentation that is trained on; all of it would only be slower
MAX_TRAIN_CHARS = 6000  # a longer row is mostly a tool schema


@dataclass(frozen=True)
class Row:
    """One conversation: its text, where it is from and what identifies it as a duplicate."""

    text: str
    domain: str
    source: str
    license: str
    prompts: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def scored_share(self) -> float:
        """Characters of assistant content over all characters."""
        return sum(map(len, self.answers)) / len(self.text)

    def keys(self) -> set[str]:
        """What another row must not share with this one: text, user messages, natural answers.

        Generated answers ("The answer is 7.") repeat by nature, so only their prompts count.
        """
        found = {self.text, *(_normal(prompt) for prompt in self.prompts)}
        if self.domain in NATURAL:
            found |= {_normal(answer) for answer in self.answers}
        return found


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def harmony_template() -> Template:
    """The chat template that ships with the tokenizer, compiled the way transformers does."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return env.from_string(Path(__file__).with_name("harmony.jinja").read_text())


TEMPLATE = harmony_template()


def make_row(
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    domain: str,
    source: str,
    license_name: str,
) -> Row:
    """Render one conversation."""
    return Row(
        TEMPLATE.render(messages=messages, tools=tools or None),
        domain,
        source,
        license_name,
        tuple(m["content"] for m in messages if m["role"] == "user"),
        tuple(m["content"] for m in messages if m["role"] == "assistant"),
    )


def schema(tool: Tool) -> dict[str, Any]:
    """A generator's tool as the JSON schema the chat template reads."""
    name, description, arguments = tool
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"name": name, "description": description, "parameters": parameters}


def generated_rows(seed: int, own: int, gym: int, agents: int) -> list[Row]:
    """Conversations of the generators: `own` and `gym` of each kind, `agents` in all."""
    rows = []
    for name, generator in OWN.items():
        rng = random.Random(f"{name}/{seed}")
        domain = "skill" if name in TRAIN_ONLY else "own"
        partners = [f for other, f in OWN.items() if (other in TRAIN_ONLY) == (domain == "skill")]
        for _ in range(own):
            messages = generator(rng)
            if rng.random() < SECOND_PROBLEM:
                messages = messages + rng.choice(partners)(rng)
            rows.append(make_row(messages, None, domain, f"eaft_prune/{name}", "Apache-2.0"))
    for task in GYM:
        domain = "skill" if task in TRAIN_ONLY else "gym"
        for messages in gym_conversations(task, gym, seed):
            rows.append(make_row(messages, None, domain, f"reasoning-gym/{task}", "Apache-2.0"))
    rng = random.Random(f"agents/{seed}")
    for _ in range(agents):
        tools, messages = agent_conversation(rng)
        declared = [schema(tool) for tool in tools]
        rows.append(make_row(messages, declared, "agent", "eaft_prune/agents", "Apache-2.0"))
    return rows


def published_rows(data: Path) -> list[Row]:
    """CodeIO, BFCL and chat rows as they are, in harmony text."""
    rows = []
    for name, domain in (("reasoning", "codeio"), ("tools", "bfcl"), ("general", "chat")):
        for record in pq.read_table(data / f"{name}.parquet").to_pylist():
            tools = json.loads(record["tools"]) if record["tools"] else None
            messages = json.loads(record["messages"])
            row = make_row(messages, tools, domain, record["source"], record["license"])
            if len(row.text) <= MAX_TRAIN_CHARS:
                rows.append(row)
    return rows


def doc_rows(data: Path, seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """Plain documentation to train on, conversations that continue it, and such of other chapters.

    The last are of every `HELD_OUT`th chapter, none of which is in the others.
    """
    rng = random.Random(f"docs/{seed}")
    plain, continued, held = [], [], []
    for i, record in enumerate(pq.read_table(data / "docs.parquet").to_pylist()):
        of = (record["source"], record["license"])
        rows = [continuation(piece, rng, *of) for piece in pieces(record["text"])]
        if i % HELD_OUT == 0:
            held += rows
            continue
        continued += rows
        text = record["text"].replace("<|endofdoc|>", "")
        if rng.random() < DOC_SHARE and "<|" not in text:
            for start in range(0, len(text), 3000):
                plain.append(Row(text[start : start + 3000], "docs", *of, (), ()))
    return plain, continued, held


def pieces(text: str) -> list[str]:
    """Whole paragraphs of one page, within the limits of `PIECE`; what fits in none is left out."""
    found = []
    for page in text.split("<|endofdoc|>"):
        some = ""
        for paragraph in page.split("\n\n"):
            some += f"{paragraph}\n\n"
            if len(some) >= PIECE[0]:
                if len(some) <= PIECE[1] and "<|" not in some:
                    found.append(some.strip("\n"))
                some = ""
    return found


def paragraphs(row: Row) -> list[str]:
    """Those of some length, of the text that was cut in two too."""
    text = row.text
    if row.domain == "continued":
        text = f"{row.prompts[0].removeprefix(CONTINUE)} {row.answers[0]}"
    return [part for part in text.split("\n\n") if len(part) > 60]


def continuation(piece: str, rng: random.Random, source: str, license_name: str) -> Row:
    """A user gives the first words of a text, the assistant the rest."""
    cut = piece.rfind(" ", 0, int(len(piece) * rng.uniform(0.15, 0.35)))
    cut = max(cut, 1)
    messages = [user(CONTINUE + piece[:cut]), final(piece[cut:].lstrip(" "))]
    return make_row(messages, None, "continued", source, license_name)


def draw_packs(pool: list[Row], seed: int) -> dict[str, list[Row]]:
    """Draw the rows of each pack by domain quota; no row shares a key with any row drawn before.

    Published rows are kept short and mostly assistant text, because only that is scored.
    """
    rng = random.Random(f"packs/{seed}")
    by_domain: dict[str, list[Row]] = defaultdict(list)
    for row in pool:
        by_domain[row.source if row.domain == "continued" else row.domain].append(row)
    limits = {"codeio": (2400, 0.5), "bfcl": (1000, 0.13)}
    for domain, rows in by_domain.items():
        rng.shuffle(rows)
        longest, share = limits.get(domain, (2000, 0.0))
        rows[:] = [r for r in rows if len(r.text) <= longest and r.scored_share >= share]
    taken: set[str] = set()
    packs: dict[str, list[Row]] = {}
    for pack in PACKS:
        rows = []
        for domain, quota in QUOTAS[pack].items():
            left = quota
            while left and by_domain[domain]:
                row = by_domain[domain].pop()
                if not row.keys() & taken:
                    taken |= row.keys()
                    rows.append(row)
                    left -= 1
        rng.shuffle(rows)
        packs[pack] = rows
    return packs


def hold_out(rows: list[Row], packs: dict[str, list[Row]]) -> list[Row]:
    """Training rows: those that share no key with a pack row, each text once."""
    held = set().union(*(row.keys() for rows in packs.values() for row in rows))
    unique = {row.text: row for row in rows}
    return [row for row in unique.values() if not row.keys() & held]


def prove_disjoint(train: list[Row], packs: dict[str, list[Row]]) -> None:
    """Raise when a pack row's text, user message or natural answer is in the training rows.

    Independent of `hold_out`: looks the raw strings up instead of the keys.
    """
    texts = {row.text for row in train}
    prompts = {prompt for row in train for prompt in row.prompts}
    natural = {a for row in train if row.domain in NATURAL for a in row.answers}
    plain = "\n".join(row.text for row in train if row.domain == "docs")
    for pack, rows in packs.items():
        for row in rows:
            if row.text in texts or prompts & set(row.prompts):
                raise RuntimeError(f"{pack}: a row is in the training data: {row.text[:200]}")
            if row.domain in NATURAL and natural & set(row.answers):
                raise RuntimeError(f"{pack}: an answer is in the training data: {row.text[:200]}")
            if row.domain == "continued" and row.answers[0] in plain:
                raise RuntimeError(f"{pack}: an answer is in the documents: {row.text[:200]}")


def train_tokenizer(rows: list[Row], vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE (no unknown token); digits stand alone so that arithmetic is regular."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer/{seed}")
    share = {"own": 0.05, "gym": 0.1, "agent": 0.08, "docs": 0.12, "continued": 0.12}
    texts = [row.text for row in rows if rng.random() < share.get(row.domain, 1.0)]
    plain = (re.sub(r"<\|\w+\|>", "\n", text) for text in texts)
    tokenizer.train_from_iterator(plain, trainer)
    return tokenizer


def write_packs(packs: dict[str, list[Row]], folder: Path) -> None:
    """One parquet per pack: text, id, source, license."""
    folder.mkdir(parents=True, exist_ok=True)
    for pack, rows in packs.items():
        table = pa.table(
            {
                "text": [row.text for row in rows],
                "id": [f"{pack}-{i:05d}" for i in range(len(rows))],
                "source": [row.source for row in rows],
                "license": [row.license for row in rows],
            }
        )
        pq.write_table(table, folder / f"{pack}.parquet", compression="zstd", compression_level=19)


def pack_report(packs: dict[str, list[Row]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Rows, tokens, scored tokens and sources of each pack."""
    report = {}
    for pack, rows in packs.items():
        count = [len(e.ids) for e in tokenizer.encode_batch([row.text for row in rows])]
        answers = [answer for row in rows for answer in row.answers]
        scored = sum(len(e.ids) for e in tokenizer.encode_batch(answers))
        report[pack] = {
            "rows": len(rows),
            "tokens": sum(count),
            "scored_share": round(scored / sum(count), 3),
            "sources": dict(Counter(row.source for row in rows).most_common()),
        }
    return report


def write_tokens(rows: list[Row], tokenizer: Tokenizer, path: Path) -> dict[str, int]:
    """Token ids of each domain, every row followed by EOS as in evaluation blocks."""
    eos = tokenizer.token_to_id("<|return|>")
    by_domain: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        by_domain[row.domain].append(row.text)
    arrays: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for domain, texts in sorted(by_domain.items()):
        ids, lengths = [], []
        for start in range(0, len(texts), 2000):
            for encoded in tokenizer.encode_batch(texts[start : start + 2000]):
                ids.append(np.array([*encoded.ids, eos], dtype=np.uint16))
                lengths.append(len(encoded.ids) + 1)
        arrays[f"{domain}/ids"] = np.concatenate(ids)
        arrays[f"{domain}/lengths"] = np.array(lengths, dtype=np.int32)
        counts[domain] = int(arrays[f"{domain}/ids"].size)
        print(f"{domain}: {len(texts)} rows, {counts[domain]} tokens", flush=True)
    np.savez_compressed(path, **arrays)
    return counts


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Build everything from `--data`; print and return what was made."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the four parquets")
    parser.add_argument("--packs", type=Path, default=Path("src/eaft_prune/demo/packs"))
    parser.add_argument("--out", type=Path, required=True, help="work folder for training files")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--vocab-size", type=int, default=4096)
    kinds = ("OWN", "GYM", "AGENT")
    parser.add_argument("--rows", type=int, nargs=3, default=ROWS, metavar=kinds)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.time()

    published = published_rows(args.data)
    plain, continued, held = doc_rows(args.data, args.seed)
    known = {part for row in (*plain, *continued) for part in paragraphs(row)}
    fresh = [row for row in held if paragraphs(row) and known.isdisjoint(paragraphs(row))]
    packs = draw_packs(published + fresh, args.seed)
    print(f"packs after {time.time() - began:.0f} s, {len(fresh)} of {len(held)} new", flush=True)
    generated = generated_rows(args.seed, *args.rows)
    train = hold_out(published + generated + continued + plain, packs)
    prove_disjoint(train, packs)
    print(f"training rows after {time.time() - began:.0f} s: {len(train)}", flush=True)

    tokenizer = train_tokenizer(train, args.vocab_size, args.seed)
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_packs(packs, args.packs)
    report: dict[str, Any] = {"seed": args.seed, "packs": pack_report(packs, tokenizer)}
    print(json.dumps(report, indent=1), flush=True)
    report["train_tokens"] = write_tokens(train, tokenizer, args.out / "tokens.npz")
    (args.out / "data.json").write_text(json.dumps(report, indent=1))
    print(f"done after {time.time() - began:.0f} s", flush=True)
    return report


if __name__ == "__main__":
    main()
