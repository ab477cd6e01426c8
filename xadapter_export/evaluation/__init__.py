"""Score a checkpoint or a bundle beside its controls; a bundle is scored without PyTorch."""
