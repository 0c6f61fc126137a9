"""Shards of webdataset from folders of classes, and their names: python benchmarks/imagenet_shards.py FOLDER SHARDS

    python benchmarks/imagenet_shards.py imagenet_samples/val shards --train 4 --val 2 --images 120

Writes imagenet1k-train-0000.tar and so on, named as `timm/imagenet-1k-wds` of the Hub, each sample a picture as it is
and its class, and names.txt. The images are shuffled; `--held-out` of them are for validation.
"""

import argparse
import io
import random
import tarfile
from pathlib import Path

from adaptvit.data import find_images


def write(path: Path, folder: Path, names: list[str], labels: dict[str, int]) -> None:
    """A shard."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            key = Path(name).stem
            for ending, content in (
                (Path(name).suffix.lower(), (folder / name).read_bytes()),
                (".cls", str(labels[name.split("/")[0]]).encode()),
            ):
                member = tarfile.TarInfo(key + ending)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--train", type=int, default=1024, help="shards")
    parser.add_argument("--val", type=int, default=64, help="shards")
    parser.add_argument("--images", type=int, help="how many; all unless told")
    parser.add_argument("--held-out", type=float, default=0.2)
    told = parser.parse_args()
    classes = sorted(path.name for path in told.folder.iterdir() if path.is_dir())
    labels = {name: number for number, name in enumerate(classes)}
    names = find_images(told.folder)
    random.Random(0).shuffle(names)
    names = names[: told.images]
    cut = round(told.held_out * len(names))
    told.shards.mkdir(parents=True, exist_ok=True)
    (told.shards / "names.txt").write_text("\n".join(classes) + "\n")
    for split, own, shards, width in (("validation", names[:cut], told.val, 2), ("train", names[cut:], told.train, 4)):
        for number in range(shards):
            path = told.shards / f"imagenet1k-{split}-{number:0{width}}.tar"
            write(path, told.folder, own[number::shards], labels)
        print(f"{len(own)} samples in {shards} shards of {split}")


if __name__ == "__main__":
    main()
