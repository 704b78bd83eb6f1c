"""Commands of the command line one after the other, by processes that torchrun started: `FILE` has a list a command."""

import json
import sys
from pathlib import Path

from uniad_fast.cli.main import app
from uniad_fast.training.processes import joined

if __name__ == "__main__":
    with joined():
        for command in json.loads(Path(sys.argv[1]).read_text()):
            code = app(command, standalone_mode=False)
            if code:
                sys.exit(code)
