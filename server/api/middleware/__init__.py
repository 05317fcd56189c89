"""What every request passes: identity, keys, and limits on bodies and rates."""
