"""The portable graph: one torch module for set and task, traced to standard operators and checked."""
