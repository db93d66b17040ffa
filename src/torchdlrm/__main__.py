"""`python -m torchdlrm` is `dlrm`, where the command is not on the path."""

from torchdlrm.cli.main import main

if __name__ == "__main__":
    main()
