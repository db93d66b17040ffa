"""The tables while they are trained: on CPU by kernels of our own, and their optimizers."""
