"""python -m minprefix"""

import sys

try:
    from minprefix.cli.main import main

    sys.exit(main())
except KeyboardInterrupt:  # while importing
    print("minprefix: interrupted", file=sys.stderr)
    sys.exit(130)
