"""Measures the memory that a data set of 224 x 224 images takes: config/imagenet30.yaml on synthetic JPEG files.

    python -m results.data_sets.memory --folder /tmp/drawn --count 39000

For each `data.placement`, a separate process loads, poisons and fetches batches as a run does, and prints its peak resident
memory, with and without pages of mapped files, which the system may drop at any time. The folder (0.5 GB of images and a table
of 6 GB) is kept for a second call.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 30
MEASURE = """
from pathlib import Path
import torch
import ASD  # all that a run imports
from data.sources import prepare
from utils import config

def memory(key):
    return next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith(key))

c = config.load({yaml!r}, [f"dataset_dir={folder}", "saved_dir={folder}/saved", "data.placement={place}"])
before = memory("VmRSS")
data = prepare(c, Path("{folder}/run-{place}"), torch.device("cpu"))
order, most = torch.randperm(len(data.train)), 0.0
for start in range(0, len(order), 192):
    data.train.fetch(order[start : start + 192])
    most = max(most, memory("RssAnon"))
print(f"{place}: {{len(data.train)}} training images, table {{data.train.images.numel() / 1e9:.2f}} GB; resident memory: "
      f"{{before:.2f}} GB before, peak {{memory('VmHWM'):.2f}} GB; while fetching {{most:.2f}} GB without mapped files")
"""


def draw(folder: Path, count: int) -> None:
    """Write JPEG files of about 13 kB: copies of 60 smooth images."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(60):
        small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        file = io.BytesIO()
        small.resize((300, 280), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        encoded.append(file.getvalue())
    for part, total in (("train", count), ("test", 50 * CLASSES)):
        for label in range(CLASSES):
            (folder / part / f"class{label:02d}").mkdir(parents=True, exist_ok=True)
        for i in range(total):
            (folder / part / f"class{i % CLASSES:02d}" / f"{i:05d}.jpg").write_bytes(encoded[i % len(encoded)])


def main() -> None:
    """Write the images if they do not exist, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=39000)
    args = parser.parse_args()
    if not args.folder.exists():
        draw(args.folder, args.count)
    yaml = str(ROOT / "config/imagenet30.yaml")
    for place in ("disk", "host"):
        code = MEASURE.format(yaml=yaml, folder=args.folder.resolve(), place=place)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
