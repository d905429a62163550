"""What the pages say is so: links, paths, commands, lists, examples and their length."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.runs import REPOSITORY

from eaft_prune.cli.main import check
from eaft_prune.core.types import UserError
from eaft_prune.engines.registry import ENGINES
from eaft_prune.tasks import TASKS

DOCS = REPOSITORY / "docs"
USER = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
BESIDE = [
    *(REPOSITORY / name for name in ("conf/README.md", "tools/README.md", "benchmarks/README.md")),
    *sorted((REPOSITORY / "src").rglob("README.md")),
]
PAGES = {str(path.relative_to(REPOSITORY)): path for path in (*USER, *BESIDE)}
# a path of the repository, as prose and comments name one
PATH = re.compile(r"(?<![\w/.$])((?:src|tests|docs|conf|tools|benchmarks|sweeps)/[\w./-]*\w)")
WHERE = ("src", "tests", "conf", "sweeps", "benchmarks", "tools")
PLACES = {"DIR": "/dir", "FILE": "/file", "URL": "http://host:30000", "...": "/placeholder"}


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(path.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = PAGES[page]
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page: str) -> None:
    named = PATH.findall(re.sub(r"\]\([^)]*\)", "]", PAGES[page].read_text()))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`([\w/]+\.py)`", prose(PAGES[page].read_text()))
    roots = (REPOSITORY, REPOSITORY / "src/eaft_prune", PAGES[page].parent)
    assert [file for file in named if not any((root / file).exists() for root in roots)] == []


def test_pages_that_the_code_names_exist() -> None:
    lost = []
    for room in WHERE:
        for file in (REPOSITORY / room).rglob("*"):
            if file.suffix not in (".py", ".yaml", ".sh", ".toml"):
                continue
            for page in re.findall(
                r"(?<![\w/])(?:docs|conf|benchmarks)/[\w-]+\.md", file.read_text()
            ):
                if not (REPOSITORY / page).exists():
                    lost.append(f"{file.relative_to(REPOSITORY)}: {page}")
    assert lost == []


def commands(path: Path) -> Iterator[str]:
    """Arguments of every command of ours that a page shows, in blocks and in line."""
    text = path.read_text()
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if not language:
            found += block.replace("\\\n", " ").splitlines()
    found += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]
    shell = dict(re.findall(r'^(\w+)="(.*)"$', text, re.M))
    for line in found:
        line = re.sub(r"\$(\w+)", lambda name: shell.get(name[1], name[0]), line)
        if match := re.search(r"(?:python -m eaft_prune|eaft-prune) (?!\.\.\.)(.*)", line):
            yield match[1]


def filled(command: str) -> list[str]:
    """The arguments with something in every placeholder."""
    command = command.replace("{...}", "{a: /a.parquet}").replace("\\`", "`")
    for place, value in PLACES.items():
        command = re.sub(rf"(?<==){re.escape(place)}(?=[\s,}}'\]]|$)", value, command)
    return [part for part in shlex.split(command, comments=True) if not ELSEWHERE.match(part)]


# a file that must be there, launchers that are not installed where tests run, and the grid whose
# 25 points tests/config composes
ELSEWHERE = re.compile(r"recipe=|\+?hydra[./]launcher|\+sweeps=weight_grid")
COMMANDS = {shlex.join(filled(one)): one for path in (*USER, *BESIDE) for one in commands(path)}
REFUSED = ("pruning.keepn=20", "model=gptoss20b", "pruning.keep_n=30")  # shown with their error


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 50


@pytest.mark.dear
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.slow
def test_a_command_composes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "examples")
    arguments = shlex.split(command)
    if {"--help", "--cfg"} & set(arguments) or command in REFUSED:
        return
    if "eval.tasks=" in command and find_spec("lm_eval") is None:
        with pytest.raises(UserError, match=r"pip install 'eaft_prune\[tasks\]'"):
            check(arguments)
    else:
        assert check(arguments).experiments


def test_use_lists_every_task() -> None:
    (table,) = re.findall(
        r"<!-- tasks -->\n(.*?)<!-- tasks: end -->", (DOCS / "use.md").read_text(), re.S
    )
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.M)
    assert rows == [(name, task.help) for name, task in TASKS.items()]


def test_use_lists_every_engine() -> None:
    (line,) = re.findall(
        r"^`engine.name` is (.*), or `module:NAME`", (DOCS / "use.md").read_text(), re.M
    )
    assert re.findall(r"`(\w+)`", line) == list(ENGINES)


def test_use_lists_every_sweep() -> None:
    table = (DOCS / "use.md").read_text().partition("| `+sweeps=` |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert sorted(named) == sorted(path.stem for path in (REPOSITORY / "sweeps").glob("*.yaml"))


EXAMPLES = sorted(path.stem for path in (DOCS / "examples").glob("*.py"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_extending_shows_the_example_that_is_tested(name: str) -> None:
    page = (DOCS / "extending.md").read_text()
    (shown,) = re.findall(rf"^<!-- example: {name} -->\n```python\n(.*?)^```$", page, re.M | re.S)
    assert shown == (DOCS / "examples" / f"{name}.py").read_text()


def test_extending_names_every_room() -> None:
    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "extending.md").read_text(), re.M)
    rooms = {path.parent.name for path in (REPOSITORY / "src/eaft_prune").glob("*/__init__.py")}
    assert len(named) == len(set(named))
    assert set(named) == rooms | {"__main__"}


def words(path: Path) -> int:
    return len(path.read_text().split())


def test_pages_are_few_and_short() -> None:
    assert len(list(DOCS.glob("*.md"))) <= 7
    assert words(REPOSITORY / "README.md") <= 900
    assert sum(words(path) for path in DOCS.glob("*.md") if path.name != "LOG.md") <= 16_000
