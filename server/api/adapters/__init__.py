"""The control plane's routes: publish, pin, alias and merge adapters."""
