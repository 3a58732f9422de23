"""Engines against each other: at equal scored tokens, on one split, with the uniform line among them."""
