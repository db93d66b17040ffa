"""The file of keys: what its lines are, and what is refused."""

import pytest

from torchdlrm.errors import ConfigError
from torchdlrm.serving.api_keys import ApiKeys, read_api_keys


def test_a_byte_order_mark_comments_and_blank_lines_are_no_keys(tmp_path):
    path = tmp_path / "keys"
    path.write_bytes(b"\xef\xbb\xbffirst key\r\n\r\n# of the page\r\n  second#2  \r\n\t\n")
    keys = read_api_keys(path)
    assert keys == ("first key", "second#2")
    accepted = ApiKeys(keys)
    assert accepted.accept({b"authorization": b"Bearer first key"})
    assert not accepted.accept({b"x-api-key": b"# of the page"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key; write one a line"),
        (b"\xef\xbb\xbf\n# only a comment\n \n", "holds no key; write one a line"),
        ("key".encode("utf-16"), "is no text in UTF-8"),
        (b"key\nan\x00other\n", "line 2 holds a character that no header may have"),
    ],
)
def test_a_file_without_keys_that_can_be_sent_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_api_keys(path)
    assert str(refused.value).startswith(f"--api-key-file {path}: ")
    assert "\n" not in str(refused.value)
    assert "other" not in str(refused.value), "a key is not told"


def test_a_file_that_cannot_be_read_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match=f"^--api-key-file {tmp_path}: cannot be read: Is a directory$"):
        read_api_keys(tmp_path)
