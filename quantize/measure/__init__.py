"""How close a net is to another: accuracy, agreement, divergence, SQNR."""
