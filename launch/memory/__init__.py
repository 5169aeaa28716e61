"""What a rank holds in memory, by formula, and what is recomputed to make it fit."""
