"""Names, versions and the store of their bytes."""
