"""Stub."""

HTML = str


def display(*values):
    print(*values)
