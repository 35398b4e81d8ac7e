"""Fast-Slow Training on tasks whose reward a program checks: contexts evolve with the weights fixed, then weights learn under the contexts.

`loop` reads as the paper's page (arXiv 2605.12484); `run` is what the command and the queue call.
"""

import workers.consolidation  # noqa: F401  before torch is imported: it tells OpenMP how to wait
