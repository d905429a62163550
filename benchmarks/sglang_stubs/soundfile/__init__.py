"""Stub: audio input is not served here."""
