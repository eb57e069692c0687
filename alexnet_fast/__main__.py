"""``python -m alexnet_fast``: the command ``alexnet-fast``."""

from alexnet_fast.cli import main

if __name__ == "__main__":
    main()
