"""Finds slow nodes before the first step, and slow or missing ranks during the run."""
