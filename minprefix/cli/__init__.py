"""The command line, one file per command; may import every package of minprefix, and none imports
it."""
