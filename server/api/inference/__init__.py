"""Chat and completions: admission, generation, streaming."""
