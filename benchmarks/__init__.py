"""Measurements: ratios from one run, interleaved, medians of many."""
