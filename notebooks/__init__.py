"""Notebooks to look at, and what they draw with. `make notebooks` runs and saves all."""
