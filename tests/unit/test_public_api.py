import subprocess
import sys

import torchdlrm


def test_every_public_name_can_be_imported():
    assert all(getattr(torchdlrm, name) is not None for name in torchdlrm.__all__)
    assert set(torchdlrm.__all__) <= set(dir(torchdlrm))


def test_importing_the_package_imports_no_torch():
    code = "import sys, torchdlrm; torchdlrm.load_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
