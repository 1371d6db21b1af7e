import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from torchvision import datasets

from ghnlib.data.images import Augment, DataError, ImageFiles, cut_out, shift_and_flip
from ghnlib.data.sources import load_images, stratified_split


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", seed=0)


@pytest.fixture
def tree(tmp_path):
    rng = np.random.default_rng(0)
    for part, per_class in ("train", 10), ("test", 4):
        for name in "cat", "dog", "eel":
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def everything(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_digits_are_split_without_overlap_and_with_every_class(digits):
    sets = digits.train, digits.val, digits.test
    assert sum(map(len, sets)) == 1797
    assert len({image.numpy().tobytes() for part in sets for image in part.pixels}) == 1797  # all differ
    assert [round(len(part) / 1797, 2) for part in sets] == [0.64, 0.16, 0.2]  # val_share is of what test leaves
    assert all(set(part.labels.tolist()) == set(range(10)) for part in sets)
    assert digits.train.pixels.shape[1:] == (3, 16, 16)
    images, _ = next(digits.train.batches(len(digits.train)))
    assert images.mean().abs() < 1e-3 and abs(images.std() - 1) < 1e-3


def test_of_each_class_only_some_test_images_are_used(digits):
    few = load_images("digits", seed=0, test_per_class=3)
    assert torch.bincount(few.test.labels).tolist() == [3] * 10
    every = {image.numpy().tobytes() for image in digits.test.pixels}
    assert all(image.numpy().tobytes() in every for image in few.test.pixels)
    assert torch.equal(few.train.pixels, digits.train.pixels) and few.side == 16
    with pytest.raises(DataError, match="40 images per class asked for"):
        load_images("digits", seed=0, test_per_class=40)


def test_the_seed_decides_the_split():
    first, again, other = (load_images("digits", seed=seed).train.pixels for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_split_has_every_class_even_a_rare_one():
    labels = np.repeat([0, 1, 2], [100, 3, 40])
    parts = stratified_split(labels, (0.1, 0.2), seed=0)
    assert sorted(np.concatenate(parts)) == list(range(143))
    assert all(set(labels[part]) == {0, 1, 2} for part in parts)
    with pytest.raises(DataError, match="too few"):
        stratified_split(np.array([0, 0, 0, 1]), (0.1, 0.2), seed=0)


def test_a_pass_in_order_returns_every_image_once(digits):
    images, labels = everything(digits.val.batches(64))
    whole, _ = next(digits.val.batches(len(digits.val)))
    assert torch.equal(images, whole) and torch.equal(labels, digits.val.labels)


def test_a_stream_resumes_exactly(digits):
    whole, resumed = digits.train.stream(500, 7, augment=Augment(2)), digits.train.stream(500, 7, 3, Augment(2))
    batches = [next(whole) for _ in range(6)]
    for expected in batches[3:]:
        assert all(map(torch.equal, expected, next(resumed)))
    assert not torch.equal(batches[0][1], batches[2][1])  # a new pass is a new order


def test_shift_moves_by_whole_pixels_and_pads_with_black():
    pixels = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(200, 3, 5, 5)
    shifted = shift_and_flip(pixels, Augment(shift=1), Generator().manual_seed(0))
    possible = [torch.roll(torch.nn.functional.pad(pixels[0, 0], [1] * 4), (a, b), (0, 1))[1:-1, 1:-1]
                for a in (-1, 0, 1) for b in (-1, 0, 1)]  # fmt: skip
    seen = {next(k for k, one in enumerate(possible) if torch.equal(image[0], one)) for image in shifted}
    assert seen == set(range(9))


def test_flip_mirrors_about_half_of_the_images():
    pixels = torch.arange(4, dtype=torch.uint8).expand(400, 3, 4, 4)
    flipped = shift_and_flip(pixels, Augment(flip=True), Generator().manual_seed(0))[:, 0, 0, 0] == 3
    assert 150 < flipped.sum() < 250


def test_cutout_hides_a_square_of_each_image():
    images = torch.ones(300, 3, 6, 6)
    hidden = cut_out(images, 2, Generator().manual_seed(0)) == 0
    assert torch.equal(hidden[:, :1].expand_as(hidden), hidden)
    sizes = hidden[:, 0].flatten(1).sum(1)
    assert set(sizes.tolist()) == {1, 2, 4}  # less where the square leaves the image
    assert hidden[:, 0].any(0).all()
    assert (sizes == hidden[:, 0].any(1).sum(1) * hidden[:, 0].any(2).sum(1)).all()
    assert (cut_out(images[0], 2) == 0).any()


def test_subset_relabels_and_few_shot_draws_per_class(digits):
    subset = digits.train.subset([7, 3])
    assert subset.classes == ("7", "3") and set(subset.labels.tolist()) == {0, 1}
    sevens = digits.train.pixels[digits.train.labels == 7]
    assert torch.equal(subset.pixels[subset.labels == 0], sevens)
    few = subset.few_shot(5, seed=1)
    assert few.labels.bincount().tolist() == [5, 5]
    assert not torch.equal(few.pixels, subset.few_shot(5, seed=2).pixels)
    with pytest.raises(DataError, match="only"):
        subset.few_shot(5000, seed=0)


def test_a_folder_with_train_and_test_keeps_its_test_images(tree):
    splits = load_images("folder", tree, seed=0, val_share=0.2)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [24, 6, 12]
    assert splits.classes == ("cat", "dog", "eel")
    assert splits.train.pixels.shape[1:] == (3, 9, 9)
    assert splits.test.labels.tolist() != sorted(splits.test.labels.tolist())


def test_one_tree_is_split_by_seed_with_every_class_everywhere(tree):
    splits = load_images("folder", tree / "train", seed=3, image_size=6)
    sets = splits.train, splits.val, splits.test
    assert sum(map(len, sets)) == 30 and all(set(part.labels.tolist()) == {0, 1, 2} for part in sets)
    assert splits.train.pixels.shape[1:] == (3, 6, 6)


def test_an_epoch_has_a_step_even_of_fewer_images_than_a_batch(digits):
    count = len(digits.train)
    assert [digits.train.steps_per_epoch(size) for size in (count // 2, count, count + 1)] == [2, 1, 1]
    assert len(next(digits.train.stream(count + 1, 0))[1]) == count


def test_large_sets_are_read_by_a_loader_with_the_same_interface(tree):
    resident = load_images("folder", tree, seed=0, image_size=8)
    files = load_images("folder", tree, seed=0, image_size=8, resident_gib=0)
    assert isinstance(files.train, ImageFiles) and files.train.side == resident.train.side == 8
    images, labels = everything(files.val.batches(4))
    assert images.shape == (6, 3, 8, 8) and torch.equal(labels, resident.val.labels)
    augment = Augment(flip=True)
    whole = files.train.stream(5, 0, augment=augment)
    expected = [next(whole) for _ in range(3)][2]
    assert all(map(torch.equal, expected, next(files.train.stream(5, 0, 2, augment))))
    assert files.train.subset([2]).few_shot(3, 0).labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "imagenet", "folder"])
def test_a_missing_dataset_says_what_is_expected_and_what_needs_none(source, tmp_path):
    with pytest.raises(DataError, match="digits and needs no download") as error:
        load_images(source, tmp_path / "nowhere")
    assert "nowhere" in str(error.value)


def test_an_unknown_source_or_no_root_is_refused():
    with pytest.raises(DataError, match="there are digits"):
        load_images("mnits")
    with pytest.raises(DataError, match="data.root"):
        load_images("cifar10")


def bomb(path):
    """A file of some bytes that says it has 4e9 pixels."""
    header = struct.pack(">IIBBBBB", 1 << 16, 1 << 16, 8, 2, 0, 0, 0)
    parts = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
             for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    "damage", [cut, bomb, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"GIF89a")]
)
@pytest.mark.parametrize("resident", [2, 0])
def test_a_corrupt_image_is_named_in_one_line(tree, damage, resident):
    for part in "train", "test":
        damage(tree / part / "dog" / "3.png")
    said = r"^/\S+/dog/3.png is not a readable image \([^\n]+\). Delete or replace the file.\Z"
    with pytest.raises(DataError, match=said):
        list(load_images("folder", tree, seed=0, image_size=8, resident_gib=resident).test.batches(4))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [("train", "validation", "has test, validation but no train"), ("val", "valid", "valid would not be read.*in .*/val"),
     ("val/cat", "train/.cat", r"/train/.cat would be a class of images: remove")],
)  # fmt: skip
def test_folders_that_would_be_taken_for_classes_or_not_be_read_are_refused(tree, old, new, said):
    shutil.copytree(tree / "test", tree / "val")
    (tree / old).rename(tree / new)
    if old == "train":
        shutil.rmtree(tree / "val")
    with pytest.raises(DataError, match=said):
        load_images("folder", tree)


def test_folders_that_differ_in_classes_are_refused(tree):
    (tree / "test" / "eel").rename(tree / "test" / "fox")
    with pytest.raises(DataError, match="differ in classes"):
        load_images("folder", tree)


def test_the_cifar_batches_keep_the_papers_validation_images(tmp_path, monkeypatch):
    class Tiny(datasets.CIFAR10):
        def __init__(self, root, train, download):
            n = 5_020 if train else 30
            self.data = (np.arange(n) % 256).astype(np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
            self.targets, self.classes = (np.arange(n) % 10).tolist(), list("abcdefghij")

    monkeypatch.setattr(datasets, "CIFAR10", Tiny)
    splits = load_images("cifar10", tmp_path)
    assert len(splits.train) == 20 and len(splits.val) == 5_000
    assert splits.val.pixels[0, 0, 0, 0] == 20 and splits.val.labels[:3].tolist() == [0, 1, 2]
