"""One verb each: what the command line asks for, put together from sources, the repository and the mount."""
