"""Adapters from upload to matrix product, knowing nothing of HTTP or of the server.

`peft`, `validation`, `registry`, `sources` and `residency` are the control plane; `kernels` and `runtime` are the data
plane.
"""
