"""What recipes, benchmarks and tests have in common: models, objects with their pictures, texts, tables."""
