"""Functions from a network to a network, and the flow of values that they rest on."""
