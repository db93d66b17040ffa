"""The `dlrm` command on pretended GPUs. Processes that it starts import this module first, and so pretend too."""

import pretend  # noqa: F401 - changes TorchRec

from torchdlrm.cli.main import main

if __name__ == "__main__":
    main()
