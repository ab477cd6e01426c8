"""What rewrites a graph: one pass a module, each of which says what it found or fails."""
