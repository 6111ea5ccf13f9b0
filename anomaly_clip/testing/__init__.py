"""Contract of a method, as a list of named checks: for the methods of this package and others'."""

from anomaly_clip.testing.contract import Check, Outcome, check_method, contract_table, run_checks

__all__ = ["Check", "Outcome", "check_method", "contract_table", "run_checks"]
