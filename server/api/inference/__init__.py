"""Chat completions and completions: admission, generation, streaming."""
