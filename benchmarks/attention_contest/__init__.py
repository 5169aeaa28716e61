"""Ways of context-parallel attention against each other: what `ring_attention.py` measures and how it tells."""
