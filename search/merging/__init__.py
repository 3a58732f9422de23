"""Reading the parents, and turning them plus coefficients into weights; one file a merge method."""
