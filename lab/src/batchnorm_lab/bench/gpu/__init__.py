"""``batchnorm bench --gpu``: correctness, then speed, on whatever GPU is here; or, dry, every line of it on a CPU.

`cases` says what is measured, `peers` who takes part, `clock` how, `steps` whole training steps, and `run` puts
rows together and writes JSON, Markdown and the table from which `batchnorm.kernels.select` chooses.
"""
