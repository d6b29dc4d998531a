"""``python -m monoloss_plugin``: the command, also for torchrun."""

from monoloss_plugin.cli import main

if __name__ == "__main__":
    main()
