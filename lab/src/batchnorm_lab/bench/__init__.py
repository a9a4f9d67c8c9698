"""Timing of the operator against its peers, interleaved in one process, with a copy as the floor.

``shapes`` says what is timed, ``contenders`` and ``jax_peer`` who takes part, ``measure`` how one case is
timed, ``worker`` runs many cases under one thread budget in a process of its own, ``session`` starts the
workers, ``results`` keeps rows with their provenance, and ``bar`` sums them up.
"""
