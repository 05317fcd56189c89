"""From text to token ids and back, adapters' own tokenizers and templates included."""
