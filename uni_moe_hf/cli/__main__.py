"""`python -m uni_moe_hf.cli`: the same as `uni-moe`."""

import sys

from .main import main


sys.exit(main())
