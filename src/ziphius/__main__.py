"""`python -m ziphius` and the `ziphius` command."""

from __future__ import annotations

from ziphius.cli.app import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
