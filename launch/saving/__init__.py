"""Checkpoints: written whole, kept, found again, and compared with the run that resumes."""
