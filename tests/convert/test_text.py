import copy
import json
import os

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fermisvd_convert.loading import load_tokenizer
from fermisvd_convert.text import RowCounts, TextError, calibration_text, cut, windows_of


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


def test_held_back_windows_are_the_first_and_not_calibrated_on(tokenizer, code):
    every = windows_of(tokenizer, str(code), 16)
    text = calibration_text(tokenizer, [str(code)], 40, 16)
    assert len(every) >= 320
    assert torch.equal(text.held_back, every[:32])
    assert torch.equal(text.windows, every[32:72])


@pytest.mark.parametrize("length", [16, 64])
def test_held_back_windows_do_not_depend_on_the_samples(tokenizer, code, tmp_path, length):
    """Whether the text is long or short, and where one of several runs out."""
    short = tmp_path / "short.txt"
    short.write_text("class C:\n    pass\n" * 60)
    for sources in ([str(code)], [str(short)], [str(code), f"{short}@3"], [f"{code}@5", str(short)]):
        texts = [calibration_text(tokenizer, sources, samples, length) for samples in (1, 16, 256, 1000)]
        assert all(torch.equal(text.held_back, texts[0].held_back) for text in texts)
        calibrated, held_back = (
            {tuple(window.tolist()) for text in texts for window in getattr(text, name)}
            for name in ("windows", "held_back")
        )
        if sources == [str(code)]:  # of unlike windows
            assert not calibrated & held_back
        assert len(texts[-1].windows) > len(texts[1].windows) or len(texts[1].windows) < 16


def test_a_tenth_of_the_windows_is_held_back(tokenizer, code):
    every = windows_of(tokenizer, str(code), 32)
    text = calibration_text(tokenizer, [str(code)], 10_000, 32)
    assert len(text.held_back) == min(32, len(every) // 10)
    assert torch.equal(torch.cat([text.held_back, text.windows]), every)


def test_several_texts_are_taken_in_turn(tokenizer, code, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("class C:\n    pass\n" * 500)
    first, second = windows_of(tokenizer, str(code), 32), windows_of(tokenizer, str(other), 32)
    text = calibration_text(tokenizer, [str(code), str(other)], 6, 32)
    taken = torch.cat([text.held_back, text.windows])
    expected = [window for pair in zip(first, second, strict=False) for window in pair]
    assert len(text.windows) == 6
    assert torch.equal(taken, torch.stack(expected[: len(taken)]))


def test_jsonl_joins_documents_with_end_of_text(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"x = {i}"}) for i in range(50)))
    expected = []
    for i in range(50):
        expected += ([tokenizer.eos_token_id] if i else []) + tokenizer(f"x = {i}")["input_ids"]
    windows = windows_of(tokenizer, str(path), 8)
    assert windows.flatten().tolist() == expected[: windows.numel()]


def test_chats_go_through_the_template(tokenizer, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) for _ in range(20)))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    try:
        assert "<user>hello" in tokenizer.decode(windows_of(tokenizer, str(chats), 16)[0])
    finally:
        tokenizer.chat_template = None


MIXED: list = [{"text": f"x = {i}"} for i in range(60)]
for place, other in ((3, {"text": ""}), (9, {"id": "row-9"}), (20, {"messages": []}), (21, {"text": None}), (40, [])):
    MIXED.insert(place, other)


@pytest.fixture
def mixed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, MIXED)) + "\n{broken\n")
    return path


def test_the_first_bad_row_ends_the_run(tokenizer, mixed):
    with pytest.raises(TextError, match=r"rows\.jsonl: line 10: no text in its fields \(id\)"):
        windows_of(tokenizer, str(mixed), 8)


def test_bad_rows_are_skipped_and_counted(tokenizer, mixed, caplog):
    expected = []
    for i in range(60):
        expected += ([tokenizer.eos_token_id] if i else []) + tokenizer(f"x = {i}")["input_ids"]
    windows = windows_of(tokenizer, str(mixed), 8, skip_bad_rows=True)
    assert windows.flatten().tolist() == expected[: windows.numel()]
    text = calibration_text(tokenizer, [str(mixed)], 8, 8, skip_bad_rows=True)
    assert text.rows == [(str(mixed), RowCounts(used=60, skipped=2, refused=4))]
    assert text.beginning == tokenizer.decode(text.windows[0])
    assert f"{mixed}: 60 rows used, 2 empty, 4 refused" in caplog.text
    assert f"begins: {text.beginning!r}" in caplog.text
    assert text.record(["rows.jsonl"]) == {
        "sources": [{"name": "rows.jsonl", "used": 60, "skipped": 2, "refused": 4}],
        "beginning": text.beginning,
    }


def test_rows_without_text_alone_are_no_text(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": ""}\n{"id": 1}\n' * 9)
    with pytest.raises(TextError, match=r"0 tokens, shorter than one window of 8 \(0 rows used, 9 empty, 9 refused\)"):
        windows_of(tokenizer, str(path), 8, skip_bad_rows=True)


def with_bos(tokenizer):
    """The tokenizer as Llama 3's: a token of its own before every text."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<bos>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
    )
    return made


def test_windows_begin_with_the_bos_that_the_tokenizer_adds(tokenizer, code):
    served = with_bos(tokenizer)
    assert served("a")["input_ids"][0] == served.bos_token_id  # as vLLM's server tokenises a prompt
    ids = tokenizer(code.read_text())["input_ids"]
    windows = windows_of(served, str(code), 32)
    assert (windows[:, 0] == served.bos_token_id).all()
    assert windows[:, 1:].flatten().tolist() == ids[: 31 * len(windows)]
    assert len(windows) == len(ids) // 31
    assert torch.equal(windows_of(served, str(code), 32, 7), windows[:7])
    assert torch.equal(windows_of(served, str(code), 32, bos=False), windows_of(tokenizer, str(code), 32))
    assert calibration_text(served, [str(code)], 8, 32).bos
    assert not calibration_text(served, [str(code)], 8, 32, bos=False).bos
    assert not calibration_text(tokenizer, [str(code)], 8, 32).bos  # it adds none


def test_a_window_that_begins_with_bos_gets_no_second_one(tokenizer, tmp_path):
    served, path = with_bos(tokenizer), tmp_path / "chats.jsonl"
    served.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    rows = [{"messages": [{"role": "user", "content": f"x = {i}; " * 9}]} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    windows = windows_of(served, str(path), 16)
    assert (windows[:, 0] == served.bos_token_id).all()
    assert not (windows[:, 1] == served.bos_token_id).any()


def test_cut_of_ids_written_out():
    """1 is BOS: windows of three."""
    assert cut([5, 6, 7, 8, 9], 3, None, None) == [[5, 6, 7]]
    assert cut([5, 6, 7, 8, 9], 3, None, 1) == [[1, 5, 6], [1, 7, 8]]
    assert cut([1, 6, 7, 8, 9, 1, 5, 5], 3, None, 1) == [[1, 6, 7], [1, 8, 9], [1, 5, 5]]
    assert cut([1, 6, 7, 8, 9, 1, 5, 5], 3, 2, 1) == [[1, 6, 7], [1, 8, 9]]
    assert cut([], 3, None, 1) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "0 tokens, shorter than one window"),
        ("short.txt", b"x = 1", "shorter than one window of 32"),
        ("latin.txt", b"caf\xe9 " * 100, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{', "line 2"),
        ("numbers.jsonl", b'{"n": 1}\n', r"line 1: no text in its fields \(n\)"),
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
    assert sum(tuple(w.tolist()) in own for w in text.held_back) == 8


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


def test_a_text_given_twice_is_refused_however_it_is_written(tokenizer, code, tmp_path):
    """Its windows would be calibrated on twice, and one held back."""
    (tmp_path / "link.txt").symlink_to(code)
    for again in (code, f"{code}@2", f"{code.parent}/./{code.name}", tmp_path / "link.txt"):
        with pytest.raises(TextError, match=r"code\.txt: given twice"):
            calibration_text(tokenizer, [str(code), str(again)], 4, 16)


def test_a_pipe_is_refused(tokenizer, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TextError, match=r"pipe: a pipe or device"):
        windows_of(tokenizer, str(tmp_path / "pipe"), 16)


def test_a_folder_of_texts_is_its_files_one_after_the_other(tokenizer, tmp_path):
    """Not line by line, with an end of text behind each, as data sets' own reader has it."""
    folder, documents = tmp_path / "texts", [f"class C{i}:\n\n    x = {i}\n" * 30 for i in range(3)]
    (folder / "deeper").mkdir(parents=True)
    for name, document in zip(("a.txt", "b.jsonl", "deeper/c.TXT"), documents, strict=True):
        (folder / name).write_text(json.dumps({"text": document}) if name.endswith("jsonl") else document)
    (folder / "README.md").write_text("not a text to calibrate on")
    expected = []
    for document in documents:
        expected += [tokenizer.eos_token_id] * bool(expected) + tokenizer(document)["input_ids"]
    windows = windows_of(tokenizer, str(folder), 16)
    assert windows.flatten().tolist() == expected[: windows.numel()]
    (folder / "the strained relation.txt").write_text("")
    (folder / "train.txt").write_text("while True:\n    break\n" * 100)
    assert tokenizer.decode(windows_of(tokenizer, str(folder), 16)[0]).startswith("while True")


def test_more_windows_than_memory_may_be_asked_for(tokenizer, code):
    assert torch.equal(windows_of(tokenizer, str(code), 32, 2**31 - 1), windows_of(tokenizer, str(code), 32))


def test_long_tokens_are_read_on_for(demo_model, tmp_path):
    """A tokenizer of tokens longer than is reckoned with: the same windows, however many are asked for."""
    tokenizer = load_tokenizer(demo_model)
    tokenizer.add_tokens(["-" * 64])
    path = tmp_path / "dashes.txt"
    path.write_text("-" * 64 * 64 * 400)
    texts = [calibration_text(tokenizer, [str(path)], samples, 64) for samples in (16, 256)]
    assert torch.equal(texts[0].held_back, texts[1].held_back)
    assert [len(text.windows) for text in texts] == [16, 256]


def test_a_data_set_saved_to_disk(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": f"row {i} of the data set, with some words in it"} for i in range(40)])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    expected = tmp_path / "rows.jsonl"
    expected.write_text("\n".join(json.dumps(row) for row in rows))
    for folder in ("one", "splits"):
        found = windows_of(tokenizer, str(tmp_path / folder), 16, 5)
        assert torch.equal(found, windows_of(tokenizer, str(expected), 16, 5))
