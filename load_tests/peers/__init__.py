"""The same requests to Loraplex and to its peers on one machine, in interleaved rounds: `make bench-peers`."""
