"""Merge methods, one file each: pure kernels over the tensors of one name, no input or output, no configuration."""
