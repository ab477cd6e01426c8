"""Run a bundle: texts in, answers out, with onnxruntime, tokenizers and numpy only."""
