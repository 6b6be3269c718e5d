"""The `vernier` command: its verbs, and the processes that they start and watch over."""
