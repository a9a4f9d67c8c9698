"""The laboratory beside `batchnorm`: what is claimed of batch normalization, measured, timed and shown.

``studies`` measure claims on real data, ``bench`` times the operator against its peers, ``demo`` leads
through a network's life, ``data`` reads the images of all three. ``commands`` are what ``batchnorm demo``,
``bench`` and ``study`` call.
"""
