"""SST-2 with the real MiniLM: does a T-expert with the built-in CLIP help a classifier? With its controls."""
