"""`dinocomp/train.py` with something done first, for `composer -n N tests/launched.py WHAT run.yaml key=value ...`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    from dinocomp.train import main
    from tests.processes import fail_at_iteration
    from tests.sharding import shard_on_cpu

    # For each what is to be done first.
    first = {"shard": shard_on_cpu, "fail": lambda: fail_at_iteration(3, rank=1)}
    first[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
