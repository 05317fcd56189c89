"""Routes that manage adapters: publish, load, pin, alias and merge them."""
