"""From a checkpoint to a bundle: load, merge, trace, check, pack, prove; ``pipeline`` is the way through."""
