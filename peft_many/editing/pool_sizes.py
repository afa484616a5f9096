"""How large a pool is, if nothing else is said: in a file that imports nothing, for the command line's help."""

DEFAULT_POOL_RANK = 128
DEFAULT_STATISTICS_RANK = 256
