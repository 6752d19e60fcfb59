"""The drop folder itself: every access is relative to its descriptor, and never through a link."""
