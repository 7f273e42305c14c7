"""Measurements of drafts, budgets and the performance model."""
