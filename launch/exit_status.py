"""Exit statuses that say more than 0 (done), 1 (failed) and 2 (a wrong command or configuration). Imports no torch."""

OUTPUT_LOST = 74
"""A command whose standard output could not be written (EX_IOERR of sysexits.h)."""
STOPPED = 75
"""A run that was asked to stop, has saved, and wants to be started again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""A rank that its watchdog has ended."""
