"""From texts on disk to the micro-batches of a step."""
