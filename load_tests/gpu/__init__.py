"""What the GPU path costs, on random weights at real shapes: `make bench-gpu`."""
