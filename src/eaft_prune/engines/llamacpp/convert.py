"""Runs llama.cpp's converter: `convert.py PRE_TOKENIZER CONVERTER ARGUMENTS ...`.

PRE_TOKENIZER "" leaves the tokenizer to the converter; else it is what the converter is told where
it would look the tokenizer up in its table. Standard library only: it runs by path, in the
interpreter that has what the converter needs.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def main(pre_tokenizer: str, converter: str, arguments: list[str]) -> None:
    """The converter as its own main program."""
    home = Path(converter).resolve().parent
    sys.path[0:1] = [str(home), str(home / "gguf-py")]
    if pre_tokenizer:
        try:
            base = importlib.import_module("conversion.base")
        except ImportError:
            sys.exit("engine.pre_tokenizer takes a converter of 2026 or later (conversion/base.py)")
        base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
