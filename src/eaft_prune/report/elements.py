"""The smallest pieces of the HTML report; what comes from outside is escaped by `text`."""

from __future__ import annotations

import html


def text(value: object) -> str:
    """Escaped for element content and for double-quoted attributes."""
    return html.escape(str(value), quote=True)


def numeral(value: str) -> str:
    """With a minus sign as long as a plus."""
    return value.replace("-", "\N{MINUS SIGN}")


def small(said: str) -> str:
    """A second line, if there is one."""
    return f" <small>{text(said)}</small>" if said else ""


def scroll(label: str, table: str) -> str:
    """A table that scrolls inside its own box, by keyboard too."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">'
        f"<table>{table}</table></div>"
    )


def status(status: str) -> str:
    """A verdict in its colour."""
    return f'<span class="status {text(status.lower())}">{text(status)}</span>'
