import json

import pytest
import torch

from fermisvd_convert.source import load_tokenizer
from fermisvd_convert.text import TextError, calibration_text, windows_of


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return load_tokenizer(demo_model)


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "code.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400)))
    return path


def test_windows_are_the_text_without_special_tokens(tokenizer, code):
    ids = tokenizer(code.read_text(), add_special_tokens=False)["input_ids"]
    windows = windows_of(tokenizer, str(code), 32)
    assert windows.shape == (len(ids) // 32, 32)
    assert windows.flatten().tolist() == ids[: windows.numel()]


def test_limit_takes_the_first_windows(tokenizer, code):
    assert torch.equal(windows_of(tokenizer, str(code), 32, 5), windows_of(tokenizer, str(code), 32)[:5])


def test_newlines_are_kept_as_they_are(tokenizer, tmp_path):
    path = tmp_path / "dos.txt"
    path.write_bytes(b"a\r\nb\r\n" * 100)
    assert tokenizer.decode(windows_of(tokenizer, str(path), 16)[0]).startswith("a\r\nb\r\n")


def test_held_back_windows_are_not_calibrated_on(tokenizer, code):
    every = windows_of(tokenizer, str(code), 32)
    text = calibration_text(tokenizer, [str(code)], 40, 32)
    assert torch.equal(text.windows, every[:40])
    assert torch.equal(text.held_back, every[40:72])


def test_short_text_holds_back_a_tenth(tokenizer, code):
    every = windows_of(tokenizer, str(code), 32)
    text = calibration_text(tokenizer, [str(code)], 10_000, 32)
    assert len(text.held_back) == min(32, len(every) // 10)
    assert len(text.windows) + len(text.held_back) <= len(every)


def test_several_texts_are_taken_in_turn(tokenizer, code, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("class C:\n    pass\n" * 500)
    first, second = windows_of(tokenizer, str(code), 32), windows_of(tokenizer, str(other), 32)
    windows = calibration_text(tokenizer, [str(code), str(other)], 6, 32).windows
    assert torch.equal(windows, torch.stack([first[0], second[0], first[1], second[1], first[2], second[2]]))


def test_jsonl_joins_documents_with_end_of_text(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"x = {i}"}) for i in range(50)))
    expected = []
    for i in range(50):
        expected += ([tokenizer.eos_token_id] if i else []) + tokenizer(f"x = {i}")["input_ids"]
    windows = windows_of(tokenizer, str(path), 8)
    assert windows.flatten().tolist() == expected[: windows.numel()]


def test_jsonl_of_other_fields_and_of_chats(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": "1+1?", "answer": "two", "n": 2}) for _ in range(20)))
    assert "1+1?\ntwo" in tokenizer.decode(windows_of(tokenizer, str(rows), 16)[0])
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) for _ in range(20)))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        assert "<user>hello" in tokenizer.decode(windows_of(tokenizer, str(chats), 16)[0])
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "0 tokens, shorter than one window"),
        ("short.txt", b"x = 1", "shorter than one window of 32"),
        ("latin.txt", b"caf\xe9 " * 100, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2"),
        ("numbers.jsonl", b'{"n": 1}\n', "line 1: no text"),
    ],
)
def test_bad_text_is_named(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=f"{name}.*{message}"):
        windows_of(tokenizer, str(path), 32)


def test_text_that_does_not_exist_is_named(tokenizer):
    with pytest.raises(TextError, match=r"nowhere\.txt"):
        windows_of(tokenizer, "nowhere.txt", 32)


def test_weights_mix_the_texts_in_proportion(tokenizer, code, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("while True:\n    break\n" * 4000)
    text = calibration_text(tokenizer, [f"{code}@1", f"{other}@3"], samples=16, length=16)
    own = {tuple(w.tolist()) for w in windows_of(tokenizer, str(code), 16)}
    from_code = [tuple(w.tolist()) in own for w in text.windows]
    assert sum(from_code) == 4
    assert sum(from_code[:8]) == 2  # mixed, not one after the other


def test_a_file_whose_name_looks_weighted_is_a_file(tokenizer, tmp_path):
    path = tmp_path / "text@2"
    path.write_text("x = 1\n" * 3000)
    assert len(calibration_text(tokenizer, [str(path)], 4, 16).windows) == 4


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_must_be_positive(tokenizer, code, weight):
    with pytest.raises(TextError, match="must be positive"):
        calibration_text(tokenizer, [f"{code}@{weight}"], 4, 16)


def test_a_folder_is_a_data_set(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"row {i} of the data set, with some words in it"} for i in range(40)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    windows = windows_of(tokenizer, str(tmp_path / "set"), 16, 5)
    assert windows.shape == (5, 16)
    assert "row 0 of the data set" in tokenizer.decode(windows.flatten())


def test_a_data_set_that_is_not_there_is_named(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(TextError, match="nobody/nothing"):
        windows_of(tokenizer, "nobody/nothing", 16, 5)
