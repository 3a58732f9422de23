"""The study file: every key typed and checked before anything is opened."""
