"""Do verdicts hold under another arithmetic, which stands for another machine?

    python benchmarks/elsewhere.py [PROFILE] [--folder FOLDER]

Runs a profile anew in a clone of the last commit, with narrower vector instructions, which sum in another order, and
writes how its claims agree with the committed ones beside them (reports/PROFILE/elsewhere.json). It takes as long as
the profile, twice as long where wide instructions matter; started again with the same folder, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from ghnlib.pipeline.claims import agreement

ARITHMETIC = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
"""oneDNN uses no wide vectors, ATen none beyond the compiler's, MKL sums in another order. (Limited to AVX2 oneDNN
corrupts the memory in one network of the blocks.)"""


def main() -> int:
    """Run, compare, write; the exit status is DVC's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default="digits")
    parser.add_argument("--folder", type=Path, help="of the clone; default: a new one")
    options = parser.parse_args()
    root, folder = Path.cwd(), options.folder or Path(tempfile.mkdtemp(prefix="elsewhere-"))
    if not (folder / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(root), str(folder)], check=True)
    name = [] if options.profile == "digits" else [options.profile]
    environment = os.environ | ARITHMETIC | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "ghnlib.pipeline.profiles", *name]
    if status := subprocess.run(command, cwd=folder, env=environment).returncode:
        return status
    path = Path("reports", options.profile, "claims.csv")
    found = agreement(pd.read_csv(root / path), pd.read_csv(folder / path))
    told = {"arithmetic": ARITHMETIC, **found._asdict()}
    (root / path.with_name("elsewhere.json")).write_text(json.dumps(told, indent=1) + "\n")
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
