"""``python -m cachedit``: the same as the command ``cachedit``."""

from .cli import main

if __name__ == "__main__":
    main()
