"""`python -m paella_diffusers.cli`, the same as `paella-diffusers`."""

import sys

from . import main

sys.exit(main())
