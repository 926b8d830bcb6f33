"""The Triton kernels and their launchers. They import only torch, triton, and each other."""
