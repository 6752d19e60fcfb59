"""From a path in a drop folder to a pending delivery."""
