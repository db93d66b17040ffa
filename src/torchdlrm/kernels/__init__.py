"""How functions on arrays are compiled for the processor at hand, and dealt out to its threads."""
