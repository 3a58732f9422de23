"""Model folders, read without trusting them: parents, adapters, judges."""
