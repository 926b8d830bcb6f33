"""The Triton kernels and their launchers. They import torch and triton only, nothing else of the package."""
