"""Searches policies with Optuna: spaces, studies, evaluation, choice and verification."""
