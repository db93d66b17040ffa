import pytest

from torchdlrm.errors import ConfigError
from torchdlrm.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("79.1GiB", round(79.1 * 2**30)), ("512", 512), ("1.5 tb", 15 * 10**11)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "hbm") == size


@pytest.mark.parametrize("text", ["-80GB", "0", "80XB", "much", "", "1..5GB", "80,000GB", "8GB or so"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="`hbm`"):
        parse_bytes(text, "hbm")


def test_sizes_are_shown_in_decimal_units():
    assert [show_bytes(size) for size in (12, 4_160, 532_480_000_000)] == ["12 B", "4.16 kB", "532.5 GB"]
