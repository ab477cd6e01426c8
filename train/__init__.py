"""Recipes that train: thin programs over the library, run as ``python -m train.<recipe>``."""
