"""Measure a model: scores, costs, quality, speed, memory."""
