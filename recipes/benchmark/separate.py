"""What `audiosep separate` takes, wall and CPU time and memory: the shipped priors, files of 4 s to 10 min.

The files repeat the example mixture. Run, where nothing else runs: python recipes/benchmark/separate.py
It writes separate.txt.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

HERE = Path(__file__).parent
# In an order in which the peak of memory can only grow: it is that of the largest child so far.
CASES = [(4, []), (60, []), (600, ["--steps", "2", "--samples", "1"]), (60, ["--compile"])]


def main() -> None:
    """Run every case in a process of its own and write the file."""
    wave, rate = soundfile.read(HERE.parent / "example/mixture.wav")
    lines = [f"# {os.cpu_count()} cores, {platform.machine()}, shipped checkpoints, default settings unless said"]
    with tempfile.TemporaryDirectory() as folder:
        for seconds, options in CASES:
            file = Path(folder) / f"{seconds}s.wav"
            soundfile.write(file, np.resize(wave, seconds * rate), rate)
            command = [sys.executable, "-m", "audiosep", "separate", str(file), "-o", f"{folder}/out", "--overwrite"]
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            # Nothing is compiled beforehand.
            environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
            subprocess.run([*command, "-q", *options], check=True, env=environment)
            wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            user = after.ru_utime - before.ru_utime
            said = " ".join([f"{seconds} s", *options])
            lines.append(f"{said}: {wall:.1f} s wall, {user:.1f} s user, {after.ru_maxrss / 2**20:.2f} GiB peak so far")
            print(lines[-1], flush=True)
    (HERE / "separate.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
