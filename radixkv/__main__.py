"""The ``radixkv`` command, also as ``python -m radixkv``."""

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; an interrupt while it is being imported ends it as later ones do."""
    try:
        from radixkv import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
