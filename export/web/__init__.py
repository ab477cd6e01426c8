"""A page that runs a bundle in the browser: ``python -m export.web``."""
