"""What a user can do nothing about is not said."""

from __future__ import annotations

import logging
import warnings


def leave_out_what_no_user_can_change() -> None:
    """DeepSpeed's notes on itself, and torch's warnings that DeepSpeed calls two collectives by their former names."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    former_names = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", message=former_names, category=FutureWarning)
