"""Adapters from upload to matrix product, independent of HTTP and of the server.

`peft`, `validation`, `registry`, `sources` and `residency` are the control plane; `kernels` and `runtime` are the data
plane.
"""
