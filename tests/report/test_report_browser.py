"""The HTML report in a headless Chromium: no errors, no requests, and every control works."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.devtools import CHROMIUM, Page
from support.report_inputs import FACTS, comparison, selection

from eaft_prune.report import html_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH"),
]

PLOTS = ("base", "candidate", "difference", "p", "h", "pairs", "experts")
CHOICE = "['candidate', 'pack', 'length'].map((id) => document.getElementById(id).value).join('|')"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    damages = {"eaft_reap keep 28": 0.0, "random <b>keep</b> 24": 1.2, "reap keep 24": 0.3}
    several = comparison(damages, tokens=2_000)
    # each candidate has lost other experts; the last has no selection
    chosen = {label: selection(6, 16, 12, seed=i) for i, label in enumerate(list(damages)[:2])}
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(html_report(several, chosen, FACTS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser: Page, file: Path) -> Iterator[Page]:
    browser.look()
    browser.problems.clear()
    browser.open(file)
    yield browser
    assert browser.problems == []


def drawn(page: Page, plot: str) -> str:
    """The values that a plot shows."""
    return str(
        page.js(
            f"JSON.stringify(document.getElementById('plot-{plot}').data.map("
            "({x, y, z, name}) => [x, y, z, name]))"
        )
    )


def select(page: Page, control: str, index: int) -> None:
    node = f"document.getElementById('{control}')"
    page.js(f"{node}.selectedIndex = {index}; {node}.dispatchEvent(new Event('change'))")


def test_every_plot_is_drawn(page: Page) -> None:
    for plot in PLOTS:
        assert page.js(f"document.querySelectorAll('#plot-{plot} .main-svg').length") > 0
        assert page.js(f"document.getElementById('plot-{plot}').getAttribute('aria-label')")
    assert page.js(CHOICE) == "eaft_reap keep 28|UNION|1024"


@pytest.mark.parametrize(
    ("control", "changing"),
    [
        ("pack", ("base", "candidate", "p", "h", "pairs")),
        ("length", ("base", "candidate", "p", "h", "pairs")),
        ("candidate", ("candidate", "difference", "p", "h", "pairs")),
    ],
)
def test_selectors_change_the_plots(page: Page, control: str, changing: tuple[str, ...]) -> None:
    before = {plot: drawn(page, plot) for plot in PLOTS}
    select(page, control, 1)
    for plot in changing:
        assert drawn(page, plot) != before[plot], plot
    if control == "candidate":
        assert drawn(page, "base") == before["base"]
    select(page, control, 0)
    assert {plot: drawn(page, plot) for plot in PLOTS} == before


def test_candidate_switches_verdict_table_and_expert_map(page: Page) -> None:
    visible = (
        "[...document.querySelectorAll('[data-candidate]')].filter((n) => n.offsetParent)"
        ".map((n) => n.dataset.candidate).join('|')"
    )
    for name in ("random <b>keep</b> 24", "eaft_reap keep 28"):
        picks = "[...document.querySelectorAll('[data-pick]')]"
        page.js(f"{picks}.find((b) => b.dataset.pick === '{name}').click()")
        assert set(page.js(visible).split("|")) == {name}
        assert page.js(CHOICE).startswith(name)
        assert not page.js("document.getElementById('experts').hidden")
    page.js(f"{picks}.find((b) => b.dataset.pick === 'reap keep 24').click()")
    assert page.js("document.getElementById('experts').hidden")


def test_keyboard_moves_through_the_selectors(page: Page) -> None:
    before = drawn(page, "base")
    page.js("document.getElementById('pack').focus()")
    page.press("ArrowDown")
    page.wait(f"{CHOICE}.includes('reasoning_style')")
    assert drawn(page, "base") != before
    page.js("document.querySelector('[data-row]:last-child .pick').focus()")
    page.press("Enter")
    page.wait(f"{CHOICE}.startsWith('random')")


def test_address_holds_the_view(page: Page, file: Path) -> None:
    page.open(file, "#candidate=reap+keep+24&pack=tool_agentic&length=2048")
    assert page.js(CHOICE) == "reap keep 24|tool_agentic|2048"
    select(page, "length", 0)
    assert page.js("location.hash") == "#candidate=reap+keep+24&pack=tool_agentic&length=1024"
    page.open(file, "#candidate=unknown&pack=<img>&length=x")
    assert page.js(CHOICE) == "eaft_reap keep 28|UNION|1024"


def test_expert_map_recolours_and_reorders(page: Page) -> None:
    seen = {drawn(page, "experts")}
    for choice in ("value][value=scaled", "value][value=load", "order][value=rank"):
        page.js(f"document.querySelector('input[name={choice}]').click()")
        seen.add(drawn(page, "experts"))
    assert len(seen) == 4
    page.js("document.querySelector('input[name=value][value=rank]').click()")
    rows = page.js("document.getElementById('plot-experts').data[0].z")
    assert all(row == list(range(16, 0, -1)) for row in rows)


@pytest.mark.parametrize("width", [360, 390, 768, 1200])
def test_page_never_scrolls_sideways(page: Page, file: Path, width: int) -> None:
    page.look(width=width, height=800)
    page.open(file)
    assert page.js("document.documentElement.scrollWidth") <= width
    if width < 600:
        assert page.js("document.querySelector('.scroll').scrollWidth") > width
    widths = page.js(
        "[...document.querySelectorAll('figure > .plot')].map((n) => n._fullLayout.width)"
    )
    assert all(0 < one <= width for one in widths)


CONTRAST = """(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b); };
  const behind = (n) => { for (; n; n = n.parentElement) {
    const c = getComputedStyle(n).backgroundColor;
    if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const texts = [...document.querySelectorAll(
    'p, td, th, dt, dd, label, button, small, .status, .delta')];
  return Math.min(...texts.filter((n) => n.offsetParent && n.textContent.trim()).map((n) => {
    const [a, b] = [light(getComputedStyle(n).color), light(behind(n))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_is_accessible_in_light_and_dark(page: Page, file: Path, dark: bool) -> None:
    page.look(dark=dark)
    page.open(file)
    assert page.js("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.js(CONTRAST) >= 4.5


def test_theme_button_overrides_the_system(page: Page) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    first = page.js(paper)
    page.js("document.getElementById('theme').click()")
    assert page.js(paper) == first
    page.js("document.getElementById('theme').click()")
    assert page.js(paper) != first
    page.js("document.getElementById('theme').click()")
    assert page.js(paper) == first


PAPER = 1047  # CSS pixels between the margins of a page
# what stands out of the body, and boxes that hide part of what they hold
CUT = """(() => {
  const {left, right} = document.body.getBoundingClientRect();
  const named = (n) => `${n.tagName} ${n.getAttribute('class')} ${n.textContent.slice(0, 40)}`;
  const shown = (n) => n.checkVisibility({visibilityProperty: true}) &&
    !n.closest('#js-plotly-tester') && n.getBoundingClientRect().width;
  const all = document.querySelectorAll('body :is(:not(svg *), text, .bg, image)');
  const seen = [...all].filter(shown);
  return [
    ...seen.filter((n) => n.getBoundingClientRect().right > right + 1),
    ...seen.filter((n) => n.getBoundingClientRect().left < left - 1 && !n.closest('.skip')),
    ...[...document.querySelectorAll('.scroll')].filter((n) => n.scrollWidth > n.clientWidth + 1),
  ].map(named); })()"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names and a map for which paper is small."""
    label = "eaft_reap_policy_mean_keep_28_of_the_second_attempt"
    packs = ("reasoning_style_of_the_old_kind", "UNION")
    pair = comparison({label: 1.5}, packs=packs, tokens=2_000)
    file = tmp_path_factory.mktemp("wide") / "report.html"
    about = {"base": "x" * 200, "command": "python -m eaft_prune " + "pruning.keep_n=28 " * 30}
    file.write_text(html_report(pair, selection(60, 128, 96), FACTS, about=about), encoding="utf-8")
    return file


@pytest.mark.parametrize("screen", [1200, 390])
def test_paper_cuts_no_column_and_no_map(page: Page, wide: Path, screen: int) -> None:
    """Plots were drawn for the screen; printing lays the page out anew without telling them."""
    page.look(width=screen)
    page.open(wide)
    page.look(width=screen, paper=True)
    page.js(f"document.body.style.width = '{PAPER}px'")
    assert page.js(CUT) == []
    widths = page.js("[...document.querySelectorAll('#experts :is(.plot, .main-svg)')].map("
                     "(n) => n.getBoundingClientRect().width)")  # fmt: skip
    assert widths == [pytest.approx(PAPER, abs=1)] * len(widths)
    height = page.js("document.querySelector('#experts .plot').getBoundingClientRect().height")
    assert height < 190 / 25.4 * 96  # of a page


def test_the_pdf_has_landscape_pages(page: Page) -> None:
    pdf = page.pdf()
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf)
    assert len(boxes) > 3
    for width, height in boxes:
        assert (float(width), float(height)) == pytest.approx((842, 595), abs=1)


def test_paper_is_white_also_of_a_dark_page(page: Page, file: Path) -> None:
    page.look(dark=True)
    page.open(file)
    theme = "document.documentElement.dataset.theme"
    ink = "document.getElementById('plot-h').layout.font.color"
    page.js(f"addEventListener('beforeprint', () => {{ window.printed = [{theme}, {ink}]; }})")
    screen = page.js(ink)
    page.pdf()
    printed_theme, printed_ink = page.js("window.printed")
    assert printed_theme == "light"
    assert printed_ink != screen
    assert (page.js(theme), page.js(ink)) == ("dark", screen)


def test_the_evidence_is_in_the_type_of_the_verdict(page: Page) -> None:
    sizes = page.js(
        "[...document.querySelectorAll('.word, .word *')].map((n) => getComputedStyle(n).fontSize)"
    )
    assert len(set(sizes)) == 1
    assert " on 2,000 tokens" in page.js("document.querySelector('.word').textContent")
