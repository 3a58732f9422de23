"""Numbers computed from answers, with their intervals."""
