"""Consolidation: from a scope's feedback to an adapter version within the KL budget."""

import os

# OpenMP's threads spin while they wait for each other. On cores that others use too, they then wait for a thread that isn't running:
# beside one other trainer on two cores that was many times slower than sleeping. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
