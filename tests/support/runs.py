"""Runs of the real command line on tiny real checkpoints; fixtures over them are in worlds.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file
from support import tiny
from support.forks import Fork, fork

REPOSITORY = Path(__file__).resolve().parents[2]

# what is asked of the tiny model: one pack, one length, in file order
QUICK = (
    "eval=bigblocks",
    "eval.num_blocks=6",
    "eval.seq_lens=[64]",
    "eval.packs=[UNION]",
    "gate.seq_lens=[64]",
    "gate.rarest=0.3",  # 9 conversations
    "profile.num_blocks=8",
    "profile.seq_len=64",
    "profile.seed=null",
    "pruning.keep_n=4",
    "runtime.progress=false",
    "tracking.system_metrics=false",
    "runtime.threads=1",  # tiny matrices: more threads only wait for each other
)


@dataclass(frozen=True)
class Done:
    """A finished command line."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def results(self) -> list[dict[str, Any]]:
        """Every result.json it left, in job order."""
        paths = [p.relative_to(self.cwd) for p in self.cwd.rglob("result.json")]
        # without a sqlite file MLflow keeps its copies in the working directory
        own = [path for path in paths if "artifacts" not in path.parts]
        found = [json.loads((self.cwd / path).read_text()) for path in own]
        return sorted(found, key=lambda value: value["job"] or 0)

    @property
    def result(self) -> dict[str, Any]:
        """The one result.json it left."""
        (value,) = self.results
        return value

    def refused(self) -> str:
        """The one line on stderr of a command line that was refused before anything ran."""
        assert self.code == 2, (self.code, self.err)
        assert not self.results
        (line,) = self.err.strip().splitlines()
        assert line.startswith("error: "), line
        return line

    def failed(self, code: int = 2) -> str:
        """The error of a run that started and ended with `code`."""
        assert self.code == code, (self.code, self.out, self.err)
        assert self.result["status"] == "FAILED"
        assert self.result["exit_code"] == code
        error = self.result["error"]
        assert isinstance(error, str)
        return error


@dataclass(frozen=True)
class World:
    """A checkpoint, three packs, a store, and the arguments that point at them."""

    home: Path
    model: Path
    packs: dict[str, Path]
    uri: str
    settings: tuple[str, ...] = QUICK

    @property
    def store(self) -> Path:
        return self.home / "store"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def arguments(self) -> list[str]:
        files = ", ".join(f"{name}: {path}" for name, path in self.packs.items())
        return [
            "model=local",
            f"model.path={self.model}",
            "packs=local",
            f"packs.files={{{files}}}",
            f"tracking.uri={self.uri}",
            f"runtime.store_dir={self.store}",
            f"runtime.checkpoint_dir={self.checkpoints}",
            *self.settings,
        ]

    def run(self, *overrides: str) -> Done:
        """`python -m eaft_prune ...` in this process, in a new working directory."""
        return main([*self.arguments, *overrides], fresh_directory(self.home))

    def start(self, *overrides: str) -> Fork:
        """The same in a process of its own."""
        from eaft_prune.cli.main import main as command

        return fork(lambda: command([*self.arguments, *overrides]), fresh_directory(self.home))

    def elsewhere(self, home: Path, **changes: Any) -> World:
        """The same inputs with an empty store."""
        return replace(self, home=home, **changes)

    def copied(self, home: Path) -> World:
        """An empty store and a private copy of the checkpoint, to be damaged."""
        shutil.copytree(self.model, home / "model")
        return replace(self, home=home, model=home / "model")


def main(arguments: Sequence[str], cwd: Path) -> Done:
    """`eaft_prune.cli.main.main` in `cwd`, with its streams caught."""
    from eaft_prune.cli.main import main as command

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = command(arguments)
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue(), cwd)


def process(
    arguments: Sequence[str], cwd: Path, code: str | None = None, **environment: str
) -> Done:
    """`python -m eaft_prune`, or `python -c code`, as a process."""
    how = ["-m", "eaft_prune"] if code is None else ["-c", code]
    done = subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, cwd)


def fresh_directory(home: Path) -> Path:
    """A new working directory under `home`."""
    number = sum(1 for item in home.glob("cwd*"))
    path = home / f"cwd{number}"
    path.mkdir(parents=True)
    return path


def write_pack(path: Path, texts: Sequence[str | None], column: str = "text") -> Path:
    """A parquet file with one text column beside an id."""
    ids = [f"{path.stem}-{i}" for i in range(len(texts))]
    pq.write_table(pa.table({"id": ids, column: pa.array(texts, pa.string())}), path)
    return path


def rows(count: int, seed: int) -> list[str]:
    """tiny's conversations, every fifth one of a shape that is easy to get wrong."""
    odd = (
        "<|start|>system<|message|>be an assistant<|end|>"
        "<|start|>assistant<|channel|>final<|message|>naïve 七 nine <tag> a < b<|return|>",
        "<|start|>user<|message|>assistant says seven<|end|>"
        "<|start|>assistant<|message|>no channel, and the row ends without a closing token",
        "<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
        '{"assistant": 1}<|call|><|start|>assistants<|message|>not the role<|end|>',
    )
    texts = tiny.rows(count, seed)
    texts[::5] = [odd[i % len(odd)] for i in range(len(texts[::5]))]
    return texts


def fit_head(path: Path, texts: Sequence[str]) -> None:
    """Fit lm_head of a random checkpoint to `texts`, so that p and H spread over [0, 1]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    ).float()
    ids = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(ids[: len(ids) // 96 * 96]).view(-1, 96)
    with torch.no_grad():
        hidden = model.model(input_ids=blocks, use_cache=False).last_hidden_state[:, :-1]
    x, y = hidden.flatten(0, 1), blocks[:, 1:].flatten()
    head = torch.zeros_like(model.lm_head.weight, requires_grad=True)
    optimiser = torch.optim.Adam([head], lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(x @ head.T, y).backward()
        optimiser.step()
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = path / index["weight_map"]["lm_head.weight"]
    weights = load_file(shard)
    weights["lm_head.weight"] = head.detach().numpy()
    save_file(weights, shard, metadata={"format": "pt"})


def edit_shard(
    model: Path, tensor: str, change: Callable[[dict[str, np.ndarray[Any, Any]]], None]
) -> Path:
    """Rewrite the shard that holds `tensor` after `change` had its way with it."""
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = model / index["weight_map"][tensor]
    weights = load_file(shard)
    change(weights)
    save_file(weights, shard, metadata={"format": "pt"})
    return shard


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every file under a directory."""
    return {
        str(item.relative_to(path)): (item.stat().st_mtime_ns, item.read_bytes())
        for item in sorted(path.rglob("*"))
        if item.is_file()
    }


@contextlib.contextmanager
def untouched(*paths: Path) -> Iterator[None]:
    """Inside, no file of these directories changes."""
    before = [tree(path) for path in paths]
    yield
    assert [tree(path) for path in paths] == before
