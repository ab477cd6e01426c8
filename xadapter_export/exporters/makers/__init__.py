"""One module for each target: what makes its variants, or its deployments. A row of ``targets`` names it."""
