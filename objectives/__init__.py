"""Measuring models: questions, scores, metrics. Knows nothing of studies."""
