"""How much of fp32 a lossy variant keeps, and the texts that it is made and judged with."""
