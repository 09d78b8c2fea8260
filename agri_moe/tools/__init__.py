"""One file per command that is not training; heavy imports happen inside the functions."""
