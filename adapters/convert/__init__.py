"""Tools that convert other formats to PEFT folders and combine adapters."""
