"""Long runs of a whole server under random operations, without faults (`soak`) and with them (`chaos`)."""
