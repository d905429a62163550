"""Tests of the HTML report in a real browser, and the inputs that all report tests share."""
