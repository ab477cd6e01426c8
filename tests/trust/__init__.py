"""Damage and attacks in numbers: what ``make trust`` runs whole, and the tests in part."""
