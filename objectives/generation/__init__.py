"""Answers that a model writes: drawn, ended, judged."""
