"""C++ kernels, compiled for the processor at hand by the first call, and what launches them."""
