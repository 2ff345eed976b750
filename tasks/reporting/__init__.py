"""Reporting: one table over all variants, on the terminal and as a page."""
