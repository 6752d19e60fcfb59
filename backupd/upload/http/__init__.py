"""The destination kind "http": uploads by HTTP POST or PUT; the only package that imports httpx."""
