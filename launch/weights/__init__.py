"""Weights of runs and of converted models, at rest."""
