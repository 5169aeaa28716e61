"""Checkpoints: written whole, kept, found again, and proved to belong to the run."""
