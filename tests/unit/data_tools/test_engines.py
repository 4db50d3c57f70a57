"""tiktoken stands in for a tokenizer.json only where it gives the same ids, and is re-checked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from data_tools import engines
from data_tools.corpus import stdlib_root
from data_tools.engines import AWKWARD_TEXTS, CheckedTokenizer, choose_engine
from data_tools.manifest import DataError
from data_tools.tokenizers import JsonTokenizer, TextError, load_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
# It ends as others do, but its last bar but one is a character.
ESCAPED_BAR = r"\p{L}+|[^\s\p{L}|]+|\|(?!\s+(?!\S))|\|\s+(?!\S)|\s+"
BYTES_ALONE = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def split_by(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [{**split, "invert": False}, BYTES_ALONE]}


NO_STEPS = {"type": "Sequence", "pretokenizers": []}
# Between words it matches nothing; that is still text.
WORDS = r"\p{L}+"
PRE_TOKENIZERS = {
    "gpt2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "escaped bar": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(ESCAPED_BAR), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "words": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def train(path: Path, form: str, **description: object) -> Path:
    """A byte-level BPE of 700 ids; `description` overrides parts of the written JSON."""
    model = hf.Tokenizer(models.BPE())
    model.pre_tokenizer = PRE_TOKENIZERS[form]
    model.decoder = decoders.ByteLevel()
    if form == "llama3":
        model.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = sorted((stdlib_root() / "json").glob("*.py"))
    model.train_from_iterator([file.read_text() for file in files], trainer)
    written = json.loads(model.to_str())
    written.update(description)
    path.write_text(json.dumps(written))
    return path


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckedTokenizer]:
    folder = tmp_path_factory.mktemp("bpe")
    made = {}
    for form in PRE_TOKENIZERS:
        reference = load_tokenizer(train(folder / f"{form}.json", form))
        assert isinstance(reference, JsonTokenizer)
        made[form] = CheckedTokenizer(reference)
    return made


@pytest.mark.parametrize("form", PRE_TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text("a1 \n'.\t-é|"))
@example(text="  1  a   \n 12'3 's")
@example(text="<|endoftext|> is text")
def test_the_same_ids(checked: dict[str, CheckedTokenizer], form: str, text: str) -> None:
    tokenizer = checked[form]
    (expected,) = tokenizer.reference.encode_batch([text])
    (found,) = tokenizer.encode_batch([text])
    assert found.tolist() == expected.tolist()
    assert found.dtype == np.int32
    assert tokenizer.eod_id not in found


@pytest.mark.parametrize("form", PRE_TOKENIZERS)
def test_real_texts_and_long_runs(checked: dict[str, CheckedTokenizer], form: str) -> None:
    texts = [file.read_text() for file in sorted((stdlib_root() / "email").glob("*.py"))]
    texts += [*AWKWARD_TEXTS, " " * 50_000 + "a", "a" * 3000, "\n" * 50_000, "x" + " " * 200_000]
    for text in texts:
        (expected,) = checked[form].reference.encode_batch([text])
        assert checked[form].encode_batch([text])[0].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["NFC", "NFD", "NFKC", "Lowercase", "Strip"])
def test_texts_are_normalized_as_by_the_reference(tmp_path: Path, kind: str) -> None:
    """Python's own NFC leaves 0xc3c and some fifty others where the reference moves them."""
    change = {"type": kind}
    if kind == "Strip":
        change |= {"strip_left": True, "strip_right": True}
    reference = load_tokenizer(train(tmp_path / "a.json", "gpt2", normalizer=change))
    tokenizer, line = choose_engine(reference, "tiktoken", lambda: ["some text"])
    moved = [0x7FD, 0xC3C, 0xD3B, 0xEBA, 0x1715, 0x1AC0, 0x344, 0x958, 0x2126, 0xFB1D, 0x1D15E]
    codes = [*moved, *range(0x2E0, 0x3000), *range(0xA000, 0xD800, 17), *range(0xF900, 0xFB20)]
    texts = [f"a{chr(code)}\u0301" for code in codes]
    # Alone among what is stable: the shortcut must not take in too much.
    texts += [f"Aé\u2019漢{chr(code)}" for code in codes]
    for text in [*texts, "  Plain  ", "naïve \u2014 \u201cquoted\u201d 漢字"]:
        (expected,) = reference.encode_batch([text])
        assert tokenizer.encode_batch([text])[0].tolist() == expected.tolist(), ascii(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gpt2", "smollm", "llama3"])
def test_every_character_is_cut_alike(checked: dict[str, CheckedTokenizer], form: str) -> None:
    """The two libraries' regular expressions are of one mind on letters, digits and space."""
    tokenizer = checked[form]
    for code in (code for code in range(0x110000) if not 0xD800 <= code < 0xE000):
        letter = chr(code)
        text = f"a{letter}b 1{letter}1 {letter}{letter}'s{letter}"
        (expected,) = tokenizer.reference.encode_batch([text])
        assert tokenizer.encode_batch([text])[0].tolist() == expected.tolist(), ascii(letter)


def test_an_added_token_is_found_after_normalizing(tmp_path: Path) -> None:
    tool = {"id": 700, "content": "<tool>", "special": False, "normalized": True}
    tool.update({"single_word": False, "lstrip": False, "rstrip": False})
    path = train(tmp_path / "a.json", "gpt2", normalizer={"type": "Lowercase"})
    written = json.loads(path.read_text())
    written["added_tokens"].append(tool)
    path.write_text(json.dumps(written))
    tokenizer, _ = choose_engine(load_tokenizer(path), "tiktoken", list)
    assert 700 in tokenizer.encode_batch(["a <TOOL> b"])[0]


def test_added_tokens_that_are_not_special_are_found_in_texts(tmp_path: Path) -> None:
    tool = {"id": 700, "content": "<tool>", "special": False, "normalized": False}
    tool.update({"single_word": False, "lstrip": False, "rstrip": False})
    path = train(tmp_path / "a.json", "gpt2")
    written = json.loads(path.read_text())
    written["added_tokens"].append(tool)
    path.write_text(json.dumps(written))
    for parse_special in (False, True):
        reference = load_tokenizer(path, parse_special=parse_special)
        tokenizer, _ = choose_engine(reference, "tiktoken", list)
        for text, ids in (("a <tool> b", [700]), ("b <|endoftext|>", [0] if parse_special else [])):
            (found,) = tokenizer.encode_batch([text])
            assert found.tolist() == reference.encode_batch([text])[0].tolist()
            assert [token for token in found if token in (0, 700)] == ids


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("gpt2", {"pre_tokenizer": None}, "no pre-tokenizer"),
        ("gpt2", {"pre_tokenizer": NO_STEPS}, "no pre-tokenizer"),
        ("gpt2", {"pre_tokenizer": {"type": "Whitespace"}}, "not byte-level"),
        (
            "gpt2",
            {"pre_tokenizer": split_by(r"\p{In_Basic_Latin}")},
            "a pattern that tiktoken does not",
        ),
        ("gpt2", {"pre_tokenizer": split_by(r"\w+|[^\w]+")}, r"a pattern with \\w, of which"),
        ("gpt2", {"pre_tokenizer": split_by(r"\X")}, r"a pattern with \\X"),
        ("gpt2", {"pre_tokenizer": split_by(r"[[:alpha:]]+|.")}, r"a pattern with \[:"),
    ],
)
def test_other_forms_are_left_to_the_reference(
    tmp_path: Path, form: str, change: dict[str, object], reason: str
) -> None:
    reference = load_tokenizer(train(tmp_path / "a.json", form, **change))
    tokenizer, line = choose_engine(reference, "auto", list)
    assert tokenizer is reference
    assert re.search(reason, line)
    with pytest.raises(DataError, match=f"{reason}.*--engine tokenizers"):
        choose_engine(reference, "tiktoken", list)


def made_of(path: Path, tokens: str, merges: str, **model: object) -> Path:
    """A BPE of all bytes with these tokens and merges ("a b, ab c") behind."""
    vocab = [*pre_tokenizers.ByteLevel.alphabet(), *tokens.split(), "<|endoftext|>"]
    description = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}}
    description["merges"] = [merge.strip() for merge in merges.split(",")]
    written = {"model": {**description, **model}, "added_tokens": []}
    written["pre_tokenizer"] = {**BYTES_ALONE, "use_regex": True}
    path.write_text(json.dumps(written))
    return path


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_token_that_its_own_merges_do_not_make(tmp_path: Path, ignore_merges: bool) -> None:
    """ZQX: Z and Q are joined first, and no merge joins ZQ and X. tiktoken would."""
    path = made_of(tmp_path / "a.json", "ZQ QX ZQX", "Z Q, Q X, Z QX", ignore_merges=ignore_merges)
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, line = choose_engine(reference, "auto", list)
    assert (tokenizer is reference) == ignore_merges, line
    for text in ("ZQX", "aZQX", "QX ZQXZQX"):
        (expected,) = reference.encode_batch([text])
        assert tokenizer.encode_batch([text])[0].tolist() == expected.tolist()


def test_a_token_without_a_merge_is_found_where_merges_are_ignored(tmp_path: Path) -> None:
    path = made_of(tmp_path / "a.json", "ZQ word", "Z Q", ignore_merges=True)
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, line = choose_engine(reference, "auto", list)
    assert tokenizer is reference
    assert "a vocabulary with tokens that no merge makes" in line
    path = made_of(tmp_path / "a.json", "ZQ word", "Z Q", ignore_merges=False)
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, _ = choose_engine(reference, "tiktoken", list)
    assert tokenizer.encode_batch(["word"])[0].tolist() == [
        reference.model.token_to_id(letter) for letter in "word"
    ]


def test_merges_into_one_token_that_do_not_stand_together(tmp_path: Path) -> None:
    """ "abcd": c and d come before b and c among the merges, but not among the ids."""
    merges = "a b, c d, ab c, b c, a bc"
    path = made_of(tmp_path / "a.json", "bc ab cd abc", merges)
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, line = choose_engine(reference, "auto", list)
    assert tokenizer is reference
    assert "merges into one token that do not stand together" in line
    path = made_of(tmp_path / "a.json", "bc ab abc cd", "b c, a b, a bc, ab c, c d")
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, _ = choose_engine(reference, "tiktoken", list)
    for text in ("abcd", "bcd abab", "cdabc"):
        (expected,) = reference.encode_batch([text])
        assert tokenizer.encode_batch([text])[0].tolist() == expected.tolist()


def test_digits_of_which_the_package_has_two_minds(tmp_path: Path) -> None:
    """U+11DE0 is a digit to its Digits, and none to its regular expressions."""
    path = train(tmp_path / "a.json", "smollm")
    written = json.loads(path.read_text())
    written["model"]["merges"] += [["ð", "ĳ"], ["ðĳ", "·"], ["ðĳ·", "ł"], ["ðĳ·ł", "ðĳ·ł"]]
    for pair in written["model"]["merges"][-4:]:
        written["model"]["vocab"].setdefault("".join(pair), len(written["model"]["vocab"]))
    path.write_text(json.dumps(written))
    reference = load_tokenizer(path)
    tokenizer, _ = choose_engine(reference, "tiktoken", list)
    text = "a \U00011de0\U00011de0 b"
    (expected,) = reference.encode_batch([text])
    assert tokenizer.encode_batch([text])[0].tolist() == expected.tolist()


def test_the_engine_is_chosen_by_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = load_tokenizer(train(tmp_path / "a.json", "gpt2"))
    assert choose_engine(reference, "tokenizers", list)[0] is reference
    tokenizer, line = choose_engine(reference, "auto", lambda: ["one", "two"])
    assert (tokenizer.engine, "gave the ids of tokenizers on 12 texts" in line) == (
        "tiktoken",
        True,
    )
    assert tokenizer.record() == reference.record()
    monkeypatch.setattr(engines, "_GPT2", r"\p{N}+|[^\p{N}]+")
    tokenizer, line = choose_engine(reference, "auto", list)
    assert tokenizer is reference
    assert "its ids differ for a text that begins" in line
    with pytest.raises(DataError, match="choose one of auto, tokenizers, tiktoken"):
        choose_engine(reference, "fast", list)


def test_a_difference_while_running_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, _ = choose_engine(load_tokenizer(train(tmp_path / "a.json", "gpt2")), "auto", list)
    assert isinstance(tokenizer, CheckedTokenizer)
    monkeypatch.setattr(tokenizer._engine, "_encode", lambda text: [1] * len(text))
    (wrong,) = tokenizer.encode_batch(["some text"])  # one document is rarely re-checked
    assert set(wrong) == {tokenizer._engine._ids[1]}
    with pytest.raises(
        TextError, match=r"different ids by .*a\.json .*--engine tokenizers --restart"
    ) as caught:
        tokenizer.encode_batch(["some text"] * 256 * 20)
    assert 0 <= caught.value.row < 256 * 20


def test_without_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_tokenizer(train(tmp_path / "a.json", "gpt2"))
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    tokenizer, line = choose_engine(reference, "auto", list)
    assert tokenizer is reference
    assert "tiktoken is missing" in line


def test_rank_files(tmp_path: Path) -> None:
    """A tiktoken rank file with its pattern beside it gives the ids of the BPE it was made from."""
    import base64

    reference = load_tokenizer(train(tmp_path / "a.json", "gpt2"))
    assert isinstance(reference, JsonTokenizer)
    ranks, ids = engines._ranks(reference, json.loads(reference.model.to_str())["model"])
    path = tmp_path / "a.tiktoken"
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    with pytest.raises(DataError, match=r"a\.tiktoken\.json: no such file; write .*pattern"):
        load_tokenizer(path)
    beside = {"pattern": engines._GPT2, "special_tokens": {"<|endoftext|>": 699}}
    Path(f"{path}.json").write_text(json.dumps(beside))
    model = load_tokenizer(path)
    assert (model.vocab_size, model.eod_id, model.kind) == (700, 699, "tiktoken")
    for text in ("some text 12", "<|endoftext|>"):
        found = model.encode_batch([text])[0]
        assert ids[found].tolist() == reference.encode_batch([text])[0].tolist()
        assert model.decode(found) == text
    parsing = load_tokenizer(path, parse_special=True)
    assert parsing.encode_batch(["<|endoftext|>"])[0].tolist() == [699]
    assert parsing.fingerprint == model.fingerprint
    beside["pattern"] = "[a-z]"
    Path(f"{path}.json").write_text(json.dumps(beside))
    other = load_tokenizer(path)
    assert other.fingerprint != model.fingerprint
    assert other.decode(other.encode_batch(["abc"])[0]) == "abc"
    with pytest.raises(TextError, match='"pattern" in a.tiktoken.json leaves out some') as caught:
        other.encode_batch(["abc", "a1"])
    assert caught.value.row == 1
    with pytest.raises(TextError, match="the tokenizer fails at this text .*StackOverflow"):
        model.encode_batch([" " * 3_000_000])


@pytest.mark.parametrize(
    ("ranks", "beside", "fault"),
    [
        (b"YQ== 0\n", {}, r"no token for the byte 0x00.*; give the rank file"),
        (b"YQ==\n", {}, "not enough values to unpack"),
        (b"YQ== 0\nYQ== 1\n", {}, "a token that stands there twice"),
        (None, {"pattern": 7}, "not a tiktoken encoding .*TypeError"),
        (None, {"special_tokens": None}, "not a tiktoken encoding"),
        (None, {"special_tokens": {"<|endoftext|>": 1 << 40}}, "OverflowError"),
        (None, {"special_tokens": {"<|endoftext|>": (1 << 32) - 1}}, "no int32 holds"),
        (None, {"special_tokens": {"<|endoftext|>": 0}}, "two tokens of the id 0"),
    ],
)
def test_unusable_rank_files(
    tmp_path: Path, ranks: bytes | None, beside: dict[str, object], fault: str
) -> None:
    import base64

    path = tmp_path / "a.tiktoken"
    whole = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    path.write_bytes(whole if ranks is None else ranks)
    settings = {"pattern": engines._GPT2, "special_tokens": {"<|endoftext|>": 256}}
    Path(f"{path}.json").write_text(json.dumps({**settings, **beside}))
    with pytest.raises(DataError, match=fault) as caught:
        load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_may_leave_out_what_the_package_fills_in(tmp_path: Path) -> None:
    """GPT-2's own tokenizer.json does not say that its model is a BPE."""
    path = train(tmp_path / "a.json", "gpt2")
    written = json.loads(path.read_text())
    del written["model"]["type"], written["model"]["byte_fallback"], written["added_tokens"]
    path.write_text(json.dumps(written))
    reference = load_tokenizer(path, eod_token="<|endoftext|>")
    tokenizer, _ = choose_engine(reference, "tiktoken", lambda: ["some text"])
    (found,) = tokenizer.encode_batch(["def f(x): 12"])
    assert found.tolist() == reference.encode_batch(["def f(x): 12"])[0].tolist()


def test_a_text_without_ids_is_told_by_its_place(tmp_path: Path) -> None:
    model = hf.Tokenizer(models.WordLevel({"known": 0, "</s>": 1}))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "a.json"))
    reference = load_tokenizer(tmp_path / "a.json")
    with pytest.raises(TextError, match="the tokenizer fails at this text .*UNK.*; cut") as caught:
        reference.encode_batch(["known", "known", "unknown", "known"])
    assert caught.value.row == 2


def test_a_text_over_which_the_package_breaks_off(tmp_path: Path) -> None:
    """Its regular expressions give up after so many tries, by a panic."""
    path = train(tmp_path / "a.json", "gpt2", pre_tokenizer=split_by(r"(a+)+\1b"))
    reference = load_tokenizer(path)
    with pytest.raises(TextError, match="the tokenizer fails at this text") as caught:
        reference.encode_batch(["fine", "a" * 60])
    assert caught.value.row == 1
