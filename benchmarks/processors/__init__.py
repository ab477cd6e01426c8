"""Other processors on this machine, by emulation: the same bundle, the same texts, the answers compared."""
