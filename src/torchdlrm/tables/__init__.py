"""The tables while they are trained: FBGEMM's kernels on all cores, and their optimizers."""
