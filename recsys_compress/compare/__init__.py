"""Comparison of methods at byte budgets: a study file in, figures and a report out."""
