"""Post-hoc calibrators: one temperature fitted on a calibration set, which changes confidences and no answer."""
