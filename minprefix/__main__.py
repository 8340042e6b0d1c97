"""python -m minprefix"""

import os
import sys

# PyTorch's threads should sleep, not spin, while they wait for one another: on a busy machine,
# spinning made a training step with two threads slower than with one. This must be set before
# PyTorch is imported; docs/guides/your_data.md has the numbers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    from minprefix.cli.main import main

    sys.exit(main())
except KeyboardInterrupt:  # during the import
    print("minprefix: interrupted", file=sys.stderr)
    sys.exit(130)
