"""Compensation: projections of the kept experts that make up for the dropped ones."""
