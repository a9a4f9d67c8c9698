"""Networks whose statistics are those of all ranks, and what ranks do together."""
