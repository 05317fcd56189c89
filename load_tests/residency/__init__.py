"""What thousands of adapters on few device slots cost, and who waits for whom: a whole server, asked over HTTP."""
