"""A comparison for people: a terminal table, Markdown for pull requests, one HTML file."""

from eaft_prune.report.about import about
from eaft_prune.report.facts import facts_text
from eaft_prune.report.gains import gains
from eaft_prune.report.html import html_report
from eaft_prune.report.markdown import markdown_report
from eaft_prune.report.table import comparison_table

__all__ = ["about", "comparison_table", "facts_text", "gains", "html_report", "markdown_report"]
