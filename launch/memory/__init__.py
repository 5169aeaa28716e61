"""Memory of a rank, by formula, and the recomputation that makes it fit."""
