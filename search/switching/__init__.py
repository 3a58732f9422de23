"""Switch Generation: several checkpoints take turns at writing one response, and a switcher learns who writes next."""
