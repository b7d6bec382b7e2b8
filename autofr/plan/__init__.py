"""Turns measurements into policies: the planner, the fit of mix weights, baselines."""
