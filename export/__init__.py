"""Recipes that export: what `make demo` and `make parity` run, over the library."""
