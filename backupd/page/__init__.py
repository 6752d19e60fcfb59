"""The page: the state of the daemon, its devices and archives as one HTML document without scripts."""
