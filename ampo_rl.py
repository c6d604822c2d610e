"""`python -m ampo_rl`: the `ampo` command, by a module name that is nobody else's."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the working directory first, where the user may have a `cli.py` or a `store/` too.
    sys.path[0] = str(Path(__file__).parent)
    from cli import main

    main()
