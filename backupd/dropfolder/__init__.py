"""Access to the files in a drop folder, relative to its descriptor and never through a symbolic link."""
