"""The demonstration: a plain network is normalized, trained, used one sample at a time, and folded.

Everything is measured in the run itself, on the handwritten digits that scikit-learn ships. ``run`` leads
through it; ``learning``, ``one_sample`` and ``costs`` measure; ``figures`` and ``report`` show.
"""
