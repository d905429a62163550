"""Whether an answer is right."""

from __future__ import annotations

import re

_FINAL = re.compile(r"<\|channel\|>final<\|message\|>(.*?)(?:<\|(?:end|return|call)\|>|$)", re.S)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
_CHOICE = re.compile(r"\b([A-J])\b")


def is_right(written: str, answer: str) -> bool:
    """Whether the final message of a turn gives the answer; a turn without one is wrong.

    A number: its last number, commas left out, is equal to a millionth. One letter of A to J: its
    last letter that stands alone is that. Else: its last line is the answer or ends with it, case,
    spaces and a full stop aside.
    """
    finals = _FINAL.findall(written)
    if not finals:
        return False
    said = finals[-1].strip()
    if _NUMBER.fullmatch(answer.strip()):
        numbers = _NUMBER.findall(said)
        wanted = _value(answer.strip())
        return bool(numbers) and abs(_value(numbers[-1]) - wanted) <= 1e-6 * max(1, abs(wanted))
    if _CHOICE.fullmatch(answer.strip()):
        letters = _CHOICE.findall(said)
        return bool(letters) and letters[-1] == answer.strip()
    last = _plain(said.splitlines()[-1]) if said else ""
    wanted_words = _plain(answer)
    return last == wanted_words or last.endswith(" " + wanted_words)


def _value(text: str) -> float:
    return float(text.replace(",", ""))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!*`\"'")
