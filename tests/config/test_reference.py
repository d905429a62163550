"""The tables of conf/README.md are those of the code."""

from __future__ import annotations

from collections.abc import Iterator

from support.runs import REPOSITORY

from eaft_prune.config import Experiment, Settings
from eaft_prune.config.defaults import section_of
from eaft_prune.config.reference import PAGE, head, meanings, page


def test_the_page_is_up_to_date() -> None:
    text = (REPOSITORY / PAGE).read_text()
    assert page(text, REPOSITORY) == text, "run python -m eaft_prune.config.reference"


def test_every_option_and_sweep_says_what_it_is() -> None:
    files = [*(REPOSITORY / "conf").glob("*/*.yaml"), *(REPOSITORY / "sweeps").glob("*.yaml")]
    assert [file.name for file in files if not head(file)] == []


def sections(section: type[Settings] = Experiment) -> Iterator[type[Settings]]:
    for field in section.model_fields.values():
        if inner := section_of(field.annotation):
            yield inner
            yield from sections(inner)


def test_every_setting_says_what_it_means() -> None:
    silent = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name in section.model_fields
        if not meanings(section).get(name)
    ]
    assert silent == ["TaskSettings.name"]  # the table of tasks says it
