"""One module for each target: what makes its variants, or its packages. A row of ``targets`` names it."""
