"""Location of adapters, and the moves between disk, host memory and device slots; no torch."""
