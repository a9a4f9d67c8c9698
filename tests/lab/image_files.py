"""Small files in the original formats of MNIST (IDX) and CIFAR-10 (binary), for tests of what reads them."""

import gzip
import struct

import numpy as np

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
    code = CODES[array.dtype.str[1:]]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(folder, train=12, test=5, gzipped=False, dotted=False, side=28):
    generator = np.random.default_rng(0)
    parts = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, side, side), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        parts[prefix] = images, labels
        for kind, axes, array in (("images", 3, images), ("labels", 1, labels)):
            name = f"{prefix}-{kind}{'.' if dotted else '-'}idx{axes}-ubyte"
            content = idx_bytes(array)
            if gzipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return parts


def write_cifar10(folder, each=4):
    generator = np.random.default_rng(1)
    written = {}
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        labels = generator.integers(0, 10, each, dtype=np.uint8)
        images = generator.integers(0, 256, (each, 3, 32, 32), dtype=np.uint8)
        records = [bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True)]
        (folder / name).write_bytes(b"".join(records))
        written[name] = images, labels
    return written
