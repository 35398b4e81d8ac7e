"""Guidelines that nobody wrote: what the replies that a user wanted have in common and those that they got have not.

They are candidates only. Whether one helps is for the optimizer to measure on the user's other feedback.
"""

from service.domain.inference.candidates import MAX_CANDIDATES, MAX_PAIRS, Candidate, Pair, infer
from service.domain.inference.following import TELLING, follows, without
from service.domain.inference.vocabulary import is_shareable

__all__ = ["MAX_CANDIDATES", "MAX_PAIRS", "TELLING", "Candidate", "Pair", "follows", "infer", "is_shareable", "without"]
