"""IFEval's checkers, as the service's verifiers load them."""

from service.verifiers.ifeval import Check, ifeval

__all__ = ["Check", "ifeval"]
