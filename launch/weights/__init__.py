"""Stored weights of runs and of converted models."""
