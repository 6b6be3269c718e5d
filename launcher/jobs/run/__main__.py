"""`python -m launcher.jobs.run RUN COMPONENT`, as a job script has it."""

import sys

from configs.console import open_streams
from launcher.jobs.run.supervisor import main

if __name__ == "__main__":
    open_streams()
    sys.exit(main())
