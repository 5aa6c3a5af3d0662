"""`python -m raysegment VERB` is `raysegment VERB`."""

import sys

from raysegment.cli import script

sys.exit(script())
