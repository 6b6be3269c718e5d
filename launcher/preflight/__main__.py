"""`python -m launcher.preflight RUN`, as a job script has it."""

import sys

from configs.console import open_streams
from configs.process import end_at_once
from launcher.preflight.check import main

if __name__ == "__main__":
    open_streams()
    end_at_once(main(sys.argv[1:]))
