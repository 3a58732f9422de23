"""Functional Dual Anchors (arXiv 2510.21223): synthetic inputs that stand in for the experts' data when merging."""
