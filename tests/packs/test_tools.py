"""Tools as harmony declares them: which calls fit, and that those of a shipped pack do."""

from __future__ import annotations

import json
import re

import pyarrow.parquet as pq
import pytest
from support.runs import REPOSITORY

from eaft_prune.packs.tools import declared, fits
from eaft_prune.packs.turn import is_well_formed

TOOLS = """<|start|>developer<|message|># Instructions

Answer. // no comment {

# Tools

## functions

namespace functions {

// Looks for a place: "anywhere", or type so = (
type find = (_: {
// Where to look, e.g. {here}
where: string,
depth?: number, // default: 3
how: "fast" | "slow",
tags?: string[],
within?: {
a: number,
b?: boolean,
},
ids?: (number | null)[],
kinds?: "a" | "b"[],
}) => any;

type stop = () => any;

type odd = (_: Record<string, Map>) => any;

} // namespace functions<|end|>"""
TOOLS += "<|start|>user<|message|>namespace mine {\ntype hack = (_: {}) => any;<|end|>"
GOOD = [
    {"where": "x", "how": "fast"},
    {"where": "", "depth": 2.5, "how": "slow", "tags": ["a"], "within": {"a": 1, "b": True}},
    {"where": "x", "how": "fast", "tags": [], "ids": [1, None]},
    {"where": "x", "how": "fast", "kinds": ["b", "a"]},
]
BAD = [
    {"where": "x"},
    {"how": "fast"},
    {"where": 3, "how": "fast"},
    {"where": "x", "how": "other"},
    {"where": "x", "how": "fast", "more": 1},
    {"where": "x", "how": "fast", "tags": [1]},
    {"where": "x", "how": "fast", "depth": True},
    {"where": "x", "how": "fast", "within": {"b": True}},
    {"where": "x", "how": "fast", "ids": ["a"]},
    {"where": "x", "how": "fast", "kinds": ["c"]},
    ["where"],
    "where",
]


def test_what_is_declared() -> None:
    assert set(declared(TOOLS)) == {"functions.find", "functions.stop", "functions.odd"}
    assert declared("<|start|>user<|message|>no tools<|end|>") == {}


@pytest.mark.parametrize("value", GOOD)
def test_what_fits(value: object) -> None:
    assert fits(declared(TOOLS), "functions.find", json.dumps(value))


@pytest.mark.parametrize("value", BAD)
def test_what_does_not(value: object) -> None:
    assert not fits(declared(TOOLS), "functions.find", json.dumps(value))
    assert fits({}, "functions.find", json.dumps(value))  # nothing says what it should be


def test_other_tools() -> None:
    tools = declared(TOOLS)
    assert fits(tools, "functions.stop", "{}")
    assert not fits(tools, "functions.stop", '{"a": 1}')
    assert fits(tools, "functions.odd", '{"a": 1}')  # not understood
    assert not fits(tools, "functions.nobody", "{}")
    assert not fits(tools, "functions.find", "{")


def test_a_turn_with_a_wrong_call_is_malformed() -> None:
    call = "<|channel|>commentary to=functions.find <|constrain|>json<|message|>{}<|call|>"
    assert is_well_formed(call, ended=True)
    assert not is_well_formed(call, ended=True, tools=declared(TOOLS))
    right = call.replace("{}", json.dumps(GOOD[0]))
    assert is_well_formed(right, ended=True, tools=declared(TOOLS))


def test_calls_of_the_shipped_packs_fit_but_for_three() -> None:
    path = REPOSITORY / "src/eaft_prune/demo/packs/tool_agentic.parquet"
    called, misfits = 0, set()
    for text in pq.read_table(path)["text"].to_pylist():
        for to, content in re.findall(
            r"<\|channel\|>commentary to=(\S+) [^{]*<\|message\|>(.*?)<\|call\|>", text, re.S
        ):
            called += 1
            if not fits(declared(text), to, content):
                misfits.add(to.removeprefix("functions."))
    assert called == 396
    # texts where numbers and lists are declared, and the other way round: read one by one
    assert misfits == {"dvRangeQuery", "ChartSeriesGenerator", "linear_regression_fit"}
