"""
Where a ResNet helps a DQN: arms x games x seeds, with controls, intervals and a way to repeat it.

    python benchmarks/atari.py --budget smoke                   # does it run? some minutes
    python benchmarks/atari.py tune --budget cpu                # a learning rate for each arm, on the tuning games
    python benchmarks/atari.py --budget cpu                     # the suite; called again, it goes on where it stopped
    python benchmarks/atari.py report                           # Markdown, JSON and PNG of all results
    python benchmarks/atari.py agent --game Boxing ...          # the agent of a run as a small file, with its card
    python benchmarks/atari.py pong                             # 5 seeds of Pong on two cores, an hour each at most
    python benchmarks/atari.py --suite minigrid --budget cpu    # the second domain

The code is in ``benchmarks/evidence/``; docs/evidence.md says what is compared and how.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Before NumPy and PyTorch are imported: one thread per process, a process per core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from evidence.commands import main

    sys.exit(main(sys.argv[1:]))
