"""Runs a policy inside a stock pipeline: reuse points, hooks, kept tensors, guidance."""
