"""python -m minprefix"""

import os
import sys

# Threads of PyTorch that wait for one another sleep instead of spinning: on a machine with other
# work, spinning made a training step with two threads slower than with one. Set before PyTorch is
# imported; docs/guides/your_data.md has the numbers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from minprefix.cli.main import main

    sys.exit(main())
except KeyboardInterrupt:  # while importing
    print("minprefix: interrupted", file=sys.stderr)
    sys.exit(130)
