"""The judgement of an adapter: applied exactly, or refused with every reason."""
