"""The table kernels and their optimizers: all that reaches into FBGEMM."""
