"""The command line, one file per command. May import all of minprefix; nothing imports it."""
