"""Hides warnings that a user can do nothing about."""

from __future__ import annotations

import logging
import warnings


def ignore_warnings_of_dependencies() -> None:
    """DeepSpeed's notes on itself, and torch's warnings of former names of collectives, by which DeepSpeed calls two,
    and we those that torch 2.11 is to know too."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    names = "all_gather_into_tensor|all_gather_tensor|reduce_scatter_tensor"
    former_names = rf"`torch\.distributed\.(_functional_collectives\.)?({names})` is deprecated"
    warnings.filterwarnings("ignore", message=former_names, category=FutureWarning)
