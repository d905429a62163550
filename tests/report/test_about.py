"""What a report opens with is what the run did, and nothing that it does not know."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from support.runs import REPOSITORY, Done, World

pytest_plugins = ("support.worlds",)


def opening(done: Done) -> dict[str, str]:
    (page,) = done.cwd.rglob("report.html")
    found = re.search(r'<dl class="about">(.*?)</dl>', page.read_text(), re.S)
    assert found
    pairs = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", found[1])
    return {label: html.unescape(fact) for label, fact in pairs}


def bought(done: Done) -> dict[str, list[str]]:
    """The first table of the page, and that the Markdown twin has the same."""
    (page,), (twin,) = done.cwd.rglob("report.html"), done.cwd.rglob("report.md")
    table = page.read_text().partition("What pruning buys")[2].partition("</table>")[0]
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', table)
    found = {
        html.unescape(what): re.findall(r'<td class="n">(.*?)</td>', cells) for what, cells in rows
    }
    for what, cells in found.items():
        assert f"| {what} | {' | '.join(cells)} |" in twin.read_text()
    return found


def rate(result: dict[str, Any], kind: str) -> float:
    """Tokens per second of all stages of a kind."""
    facts = [s["facts"] for s in result["stages"] if s["stage"].startswith(f"{kind}/")]
    facts += [s["facts"] for s in result["stages"] if s["stage"] == kind]
    return sum(f["tokens"] for f in facts) / sum(f["tokens"] / f["tokens_per_s"] for f in facts)


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """An empty store."""
    return world.elsewhere(tmp_path_factory.mktemp("about"))


@pytest.fixture(scope="module")
def done(place: World) -> Done:
    done = place.run()
    assert done.code == 0, done.err
    return done


@pytest.mark.process
def test_it_tells_model_pruning_sizes_and_code(world: World, done: Done) -> None:
    facts, result = opening(done), done.result
    assert facts["base"] == "local"
    assert facts["pruning"] == f"4 of 8 experts a layer, {result['plan']['criterion']}"
    paths = [world.model, Path(result["checkpoint"]["path"])]
    counts = [tiny.eager_model(path).num_parameters() for path in paths]
    assert facts["parameters"] == " → ".join(f"{count:,}" for count in counts)
    sizes = [sum(p.stat().st_size for p in path.glob("*.safetensors")) for path in paths]
    shown = [float(size) * 1e9 for size in re.findall(r"(\S+) GB", facts["weights"])]
    assert shown == pytest.approx(sizes, rel=0.05)  # files have headers
    if (REPOSITORY / ".git").exists():
        git = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        assert f"commit {commit[:12]}" in facts["code"]
    table = bought(done)
    assert float(table["weights, GB"][2]) == pytest.approx(sizes[1] / sizes[0], rel=0.05)
    assert table["parameters"][:2] == [f"{count:,}" for count in counts]
    # one layer of two grows: keys and values, 2 heads of 16, 2 bytes
    (room,) = (cells[1] for what, cells in table.items() if "(128 bytes each" in what)
    assert int(room.replace(",", "")) == pytest.approx((sizes[0] - sizes[1]) / 128, rel=0.05)
    assert ["not measured"] * 2 + [""] in table.values()
    assert "pruning.keep_n=4" in facts["command"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", facts["date"])


def test_it_tells_where_and_how_fast_it_was_computed(done: Done) -> None:
    facts, result = opening(done), done.result
    assert facts["dtype"] == "float32"
    assert f"{torch.get_num_threads()} thread" in facts["machine"]
    kinds = ("profile", "evaluate")
    assert facts["speed"] == ", ".join(f"{k} {rate(result, k):,.0f} tokens/s" for k in kinds)


def test_what_came_from_the_store_was_not_computed_here(place: World, done: Done) -> None:
    sides = {"base": "base", "candidate": "checkpoint"}
    digests = {side: {"digest": done.result[name]["digest"]} for side, name in sides.items()}
    speeds = {("base", 1): 10.0, ("base", 8): 40.0, ("candidate", 1): 15.0, ("candidate", 16): 90.0}
    rows = [
        {"side": side, "new_tokens": 64, "batch": batch, "total_tokens_s": speed}
        for (side, batch), speed in speeds.items()
    ]
    stable = {"base": {"64": 8}, "candidate": {"64": 16}}
    bench = {"sides": digests, "rows": rows, "max_stable_batch": stable}
    (done.cwd / "bench.json").write_text(json.dumps(bench))
    again = place.run(f"speeds={done.cwd}/bench.json")
    table = bought(again)
    assert table["tokens/s, batch 1, 64 new each"] == ["10.0", "15.0", "1.500"]
    assert table["tokens/s, largest batch, 64 new each"] == ["40.0 at 8", "90.0 at 16", "2.250"]
    facts = opening(again)
    assert {"machine", "speed"}.isdisjoint(facts)
    assert facts["dtype"] == "float32"
    assert facts["pruning"] == opening(done)["pruning"]


def test_a_comparison_of_saved_evaluations_knows_no_model(place: World, done: Done) -> None:
    saved = done.result["evaluations"]
    sides = [
        f"compare.base={done.cwd / saved['base']}",
        f"compare.candidate={done.cwd / saved['pruned']}",
    ]
    assert opening(place.run("task=compare", *sides)).keys() == {"date", "command", "code", "dtype"}
