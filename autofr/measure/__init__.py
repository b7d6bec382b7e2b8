"""Measures a pipeline: latency, similarity, quality, and what reuse costs each point."""
