"""`python -m uniad_fast` is `uniad-fast`."""

from .cli.main import main

if __name__ == "__main__":
    main()
