"""Builds feature banks: pictures through a CLIP's image tower, and texts through its text tower to search."""
