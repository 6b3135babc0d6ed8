import pytest

from rl_soft.files import JsonLines, replacing, write_atomic


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "old \ud800")
    assert path.read_text() == "old ?"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old ?"
        raise KeyboardInterrupt
    assert path.read_text() == "old ?" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"a', b"\n\0\0\0", b'\n{"a": 2'])
def test_a_killed_writer_is_gone_on_with(end, tmp_path):
    path, seen = tmp_path / "new" / "a.jsonl", []
    with JsonLines(path, "an object", seen.extend) as file:
        file.append({"a": 1})
    path.write_bytes(path.read_bytes().rstrip() + end)
    with JsonLines(path, "an object", seen.extend) as file:
        file.append({"a": 3})
    assert seen == [{"a": 1}] and path.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_what_the_owner_refuses_is_left_as_it_is(tmp_path):
    def refuse(objects):
        raise ValueError("not ours")

    path = tmp_path / "a.jsonl"
    for text in ('{"b": 1}\n{"b"', '{"b": 1}', ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="not ours"):
            JsonLines(path, "an object", refuse)
        assert path.read_text() == text
