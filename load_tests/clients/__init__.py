"""Well-known clients against a live server, each feature checked by its content: `python -m load_tests.clients`."""
