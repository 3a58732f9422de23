"""Candidates that are scored in parts, and stopped where the rest of their questions cannot put them on the front."""
