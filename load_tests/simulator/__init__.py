"""The server's scheduler, block manager and residency under a virtual clock and a cost model, without a model."""
