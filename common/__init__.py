"""Utilities that every folder may import: errors, files, devices, the environment record, number formatting."""
