"""Exit statuses of a run that ended before its last step. Imports no torch."""

STOPPED = 75
"""A run that was asked to stop, has saved, and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""A rank that its watchdog has ended."""
