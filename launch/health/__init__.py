"""Before the first step and beside the others: who is slow, who is missing."""
