"""The model's own kernels for a CPU, in C++: what they compute is in ops.cpp."""
