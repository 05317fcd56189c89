"""Tools that turn other formats into PEFT folders and combine adapters."""
