"""Evaluate SAEs: metrics, tables and pages. The model runs once over a text for all SAEs."""
