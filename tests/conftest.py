"""For all tests: what makes an outcome depend on the machine's load, or on chance, is left out."""

from hypothesis import settings

# No deadline for an example, no complaint that they are made slowly, and the same ones every time.
settings.load_profile("ci")
