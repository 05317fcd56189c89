"""Bodies of inference requests with their bounds. `server/api/fields.py` has the fields that they may have besides."""
