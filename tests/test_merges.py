"""New pieces: learned as a naive recount learns them, kept apart from all old tokens, and as short as was promised."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from agri_moe.cli import main
from agri_moe.data.chat import Chat
from agri_moe.data.extended_tokenizer import ENGLISH, Extension, byte_of_char, first_change, latin_words, with_marks
from agri_moe.data.learning_texts import read_texts
from agri_moe.data.merges import PIECES_FILE, MergeLearner, piece_rule, read_pieces, write_pieces
from agri_moe.tools.tokens import REPORT_FILE, tokens
from tests.tiny import SENTENCES, SPLIT, real_data, write_tokenizer

QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = "<|thought|>\n<|endoftext|></think> धान <|assistant|>"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer in Qwen3's form that has next to no piece of Hindi."""
    return write_tokenizer(tmp_path_factory.mktemp("source") / "tokenizer", vocab_size=300)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, source: Path, corpus: Path) -> Path:
    """It with 120 new pieces, learned from the corpus' rows."""
    folder = tmp_path_factory.mktemp("extended") / "tokens"
    tokens(source=str(source), input=[str(corpus / "train.parquet")], pieces=120, output=str(folder))
    return folder


@pytest.fixture(scope="module")
def lines(corpus: Path) -> list[str]:
    return read_texts([str(corpus / "validation.parquet")], None, 0.1, None, False).held_out + SENTENCES


# ---- the learner


def naive(words: dict[tuple[int, ...], int], pieces: dict[int, bytes], first: int, wanted: int, allowed) -> list:
    """The same by definition: all pairs of all words are counted anew for every merge."""
    words, pieces, merges = dict(words), dict(pieces), []
    while len(merges) < wanted:
        counts = Counter()
        for word, weight in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += weight
        known = set(pieces.values())
        whole = {pair: pieces[pair[0]] + pieces[pair[1]] for pair in counts}
        usable = [p for p in counts if counts[p] > 1 and whole[p] not in known and allowed(whole[p])]
        if not usable:
            break
        best = min(usable, key=lambda p: (-counts[p], pieces[p[0]], pieces[p[1]]))
        new = first + len(merges)
        pieces[new] = whole[best]
        merges.append((*best, new))
        after = Counter()
        for word, weight in words.items():
            made, at = [], 0
            while at < len(word):
                if word[at : at + 2] == best:
                    made.append(new)
                    at += 2
                else:
                    made.append(word[at])
                    at += 1
            after[tuple(made)] += weight
        words = after
    return merges


@pytest.mark.parametrize("seed", range(5))
def test_the_learner_equals_a_naive_recount(seed: int):
    draw = random.Random(seed)
    pieces = {i: bytes([97 + i]) for i in range(4)} | {4: b"ab", 5: b"bcd"}  # so that some wholes are pieces already
    words = {tuple(draw.choices(range(6), k=draw.randint(1, 9))): draw.randint(1, 5) for _ in range(60)}

    def allowed(piece: bytes) -> bool:
        return b"dd" not in piece and len(piece) < 8

    learner = MergeLearner(words, pieces, 100, allowed)
    made = list(learner.learn(40))
    expected = naive(words, pieces, 100, 40, allowed)
    assert [tuple(merge) for merge in learner.merges] == expected
    assert len(expected) > 20
    assert made == list(range(100, 100 + len(expected)))
    for piece, made_of in learner.pieces.items():
        assert b"".join(pieces[old] for old in made_of) == learner.bytes[piece]
    assert len({learner.bytes[i] for i in learner.bytes}) == len(learner.bytes), "no two pieces are alike"


def test_the_order_of_words_changes_nothing(source, lines):
    extension = Extension(Chat.load(str(source)))
    words = extension.words(dict.fromkeys(lines, 1))
    orders = [list(words.items()), sorted(words.items(), reverse=True)]
    learned = []
    for order in orders:
        learner = MergeLearner(dict(order), extension.piece_bytes, extension.first_id, piece_rule("Devanagari"))
        assert len(list(learner.learn(30))) == 30
        learned.append(learner.merges)
    assert learned[0] == learned[1]


def test_the_rule_for_pieces():
    free, whole = piece_rule("Devanagari"), piece_rule("devanagari", whole_aksharas=True)
    for text in ("क", " क", "की", " नमस्ते", "ी", "़", "ंत"):
        assert free(text.encode()), text
    for text in ("", " ", "क ", "  क", "a", "कa", "४", "।", "क।", "தமிழ்", "\u200dक", "9"):
        assert not free(text.encode()), text
    assert not free("क".encode()[:2])
    assert not free(b" \xe0\xa4")
    assert whole("की".encode())
    assert whole("ी".encode())
    assert not whole("ंत".encode())
    assert not whole(" ंत".encode())
    assert piece_rule("Tamil")("தமிழ்".encode())


def test_marks_count_as_letters():
    assert with_marks(SPLIT) == QWEN35
    assert with_marks(QWEN35) == QWEN35
    assert sorted(byte_of_char().values()) == list(range(256))


# ---- the tokenizer


def test_old_tokens_keep_their_ids_through_plain_transformers(source, extended, tmp_path):
    before = Chat.load(str(source)).tokenizer.get_vocab()
    pieces = read_pieces(extended)
    assert list(pieces) == list(range(len(before), len(before) + 120)), "after all others, the markers too"
    first = AutoTokenizer.from_pretrained(extended)
    first.save_pretrained(tmp_path / "second")
    second = AutoTokenizer.from_pretrained(tmp_path / "second")
    model = tmp_path / "model"  # as an export has it: a class of the model type would bring its own pattern
    shutil.copytree(extended, model)
    AutoConfig.for_model("qwen3_moe").save_pretrained(model)
    beside = AutoTokenizer.from_pretrained(model)
    beside.save_pretrained(model)
    text = "धान की पत्तियों पर भूरे धब्बे\n" + CONTROL
    ids = first(text)["input_ids"]
    assert set(ids) & set(pieces)
    for tokenizer in (first, second, beside, AutoTokenizer.from_pretrained(model)):
        vocabulary = tokenizer.get_vocab()
        assert before.items() <= vocabulary.items()
        assert len(tokenizer) == len(vocabulary) == len(before) + 120
        assert (
            QWEN35
            in json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"].values()
        )
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
        assert "<|thought|>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_the_learner_cuts_words_as_the_tokenizer_does(source, lines):
    extension = Extension(Chat.load(str(source)))
    words = extension.words(dict.fromkeys(lines, 1))
    learner = MergeLearner(words, extension.piece_bytes, extension.first_id, piece_rule("Devanagari"))
    list(learner.learn(150))
    built = extension.build(learner)
    for old, new in zip(words, learner.words, strict=True):
        text = b"".join(extension.piece_bytes[i] for i in old)
        assert tuple(built.encode_text(text.decode())) == new


def test_pieces_are_whole_text_made_of_the_source_own_tokens(source, extended):
    extension, chat = Extension(Chat.load(str(source))), Chat.load(str(extended))
    byte, allowed = byte_of_char(), piece_rule("Devanagari")
    for piece, made_of in read_pieces(extended).items():
        text = bytes(byte[char] for char in chat.tokenizer.convert_ids_to_tokens(piece))
        assert b"".join(extension.piece_bytes[old] for old in made_of) == text
        assert allowed(text)
        assert chat.tokenizer.decode([piece]) == text.decode()


def test_text_comes_back_and_is_shorter(source, extended, lines):
    before, after = Chat.load(str(source)), Chat.load(str(extended))
    assert sum(len(after.encode_text(line)) for line in lines) < 0.7 * sum(
        len(before.encode_text(line)) for line in lines
    )
    for line in [*lines, CONTROL, "क\u093c\u200dष ১২ x\u0301y 🌾\n\n  \t", "ka\u0304 काa aका"]:
        assert after.tokenizer.decode(after.encode_text(line)) == unicodedata.normalize("NFC", line)


def test_english_and_code_stay_token_for_token(source, extended):
    before, after = Chat.load(str(source)), Chat.load(str(extended))
    assert first_change(before, after, [ENGLISH, *ENGLISH.splitlines(), "naïve São Łódź 12.5% <b>x</b>"]) is None
    assert first_change(before, after, ["x", "धान की पत्तियों"]) == "धान की पत्तियों"
    assert latin_words(["धान PM-KISAN café 12 कg kg", "kg cafe\u0301"]) == ["PM-KISAN", "café", "kg"]


def test_text_cannot_become_a_control_token(extended):
    chat = Chat.load(str(extended))
    assert not set(chat.encode_text(CONTROL)) & set(chat.tokenizer.get_added_vocab().values())
    row = {"scenario": f"धान {CONTROL}", "thought": CONTROL, "advisory": f"छिड़काव {CONTROL}"}
    ids = chat.encode(row).input_ids
    assert sum(i in chat.control_ids for i in ids) == 5
    assert chat.parse(ids[ids.index(chat.marker_ids["thought"]) + 1 :]).advisory == row["advisory"]


def test_the_report_counts_what_was_not_learned(source, extended, corpus):
    report = json.loads((extended / REPORT_FILE).read_text())
    texts = read_texts([str(corpus / "train.parquet")], None, 0.1, None, True)
    assert not texts.learn.keys() & set(texts.held_out)
    assert report["learned"]["lines"] == len(texts.learn)
    before, after = Chat.load(str(source)), Chat.load(str(extended))
    words = sum(len(line.split()) for line in texts.held_out)
    for name, chat in (("before", before), ("after", after)):
        ids = [i for line in texts.held_out for i in chat.encode_text(line)]
        assert report[name]["tokens"] == len(ids)
        assert report[name]["tokens_per_word"] == pytest.approx(len(ids) / words)
        assert report[name]["distinct_ids"] == len(set(ids))
    assert report["round_trip"] == {"exact": len(texts.held_out), "of": len(texts.held_out)}
    counts = [one["count"] for one in report["most_used"]]
    assert counts == sorted(counts, reverse=True)
    ids = Counter(i for line in texts.held_out for i in after.encode_text(line))
    assert counts[0] == max(ids[piece] for piece in read_pieces(extended))


# ---- texts


def test_lines_count_once_and_inputs_alike(tmp_path):
    large, small, other = tmp_path / "large.txt", tmp_path / "small.txt", tmp_path / "other.jsonl"
    large.write_text("\n".join(f"धान की पत्ती {i}" for i in range(40)) + "\nधान की पत्ती 0\n")
    small.write_text("गेहूँ की पत्ती 1\nधान की पत्ती 0\n")
    other.write_text(json.dumps({"scenario": {"अनुच्छेद": "धान की पत्ती 3", "n": 5}, "advisory": "चना\n\nमटर"}) + "\n")
    texts = read_texts([str(large), str(small)], str(other), 0.1, None, True)
    assert texts.held_out == ["चना", "मटर", "धान की पत्ती 3", "5"]
    assert len(texts.learn) == 40
    assert "धान की पत्ती 3" not in texts.learn
    assert {texts.learn[f"धान की पत्ती {i}"] for i in (0, 1, 2)} == {1}
    assert texts.learn["गेहूँ की पत्ती 1"] > 20
    assert set(read_texts([str(large), str(small)], str(other), 0.1, None, False).learn.values()) == {1}
    two = tmp_path / "two.txt"
    two.write_text("धान\nचना\n")
    for share in (1e-9, 0.999):
        assert len(read_texts([str(two)], None, share, None, True).held_out) == 1


# ---- what is refused


def refused(*args: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["tokens", *args])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--pieces": "0"}, "--pieces is 0"),
        ({"--pieces": "100000"}, "ask for at most"),
        ({"--held_out": "1"}, "--held_out is 1"),
        ({"--script": "Latin"}, "--script is Latin"),
        ({"--script": "Tamil"}, "no letter of the script Tamil"),
        ({"--input": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"--text_column": "body"}, "has no column body"),
        ({"--output": "there"}, "--output there exists"),
        ({"--output": "there", "--overwrite": "true"}, "is no earlier output of this command"),
        ({"--source": "extended"}, "has new pieces already"),
        ({"--source": "metaspace"}, "no byte-level BPE tokenizer"),
    ],
)
def test_a_mistake_is_told_in_one_sentence_and_nothing_is_written(
    change, said, source, extended, corpus, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/file").touch()
    Path("extended").symlink_to(extended)
    monkeypatch.setattr(Chat, "_check_pieces", lambda self: None)  # which refuses metaspace even before
    write_tokenizer(Path("metaspace"), metaspace=True)
    options = {"--source": str(source), "--input": str(corpus / "train.parquet"), "--pieces": "5", "--output": "new"}
    before = sorted(tmp_path.iterdir())
    refused(*itertools.chain(*(options | change).items()))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error
    assert sorted(tmp_path.iterdir()) == before


def test_an_earlier_output_is_replaced_when_asked(source, corpus, tmp_path):
    for pieces in (5, 7):
        tokens(str(source), [str(corpus / "train.parquet")], pieces, str(tmp_path / "new"), overwrite=True)
        assert len(read_pieces(tmp_path / "new")) == pieces
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_the_table_of_pieces_comes_back(tmp_path):
    assert read_pieces(tmp_path) == {}
    pieces = {7: (1, 2), 8: (1, 2, 6), 9: (0, 0)}
    write_pieces(tmp_path, pieces)
    assert read_pieces(tmp_path) == pieces
    write_pieces(tmp_path, {})
    assert not (tmp_path / PIECES_FILE).exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[]", "{}", '{"format": 1}', '{"format": 2, "pieces": {"7": [1, 2]}}', '{"format": 1, "pieces": {}}',
        '{"format": 1, "pieces": {"x": [1, 2]}}', '{"format": 1, "pieces": {"7": [1, 2], "9": [1, 2]}}',
        '{"format": 1, "pieces": {"8": [1, 2], "7": [1, 2]}}', '{"format": 1, "pieces": {"7": []}}',
        '{"format": 1, "pieces": {"7": [1]}}', '{"format": 1, "pieces": {"7": [1, 7]}}',
        '{"format": 1, "pieces": {"7": 1}}',
        '{"format": 1, "pieces": {"7": [1, -1]}}', '{"format": 1, "pieces": {"7": [1, true]}}',
        '{"format": 1, "pieces": {"7": [1, 2], "8": [1, 7]}}', '{"format": 1, "pieces": {"-7": [1, 2]}}',
        '{"format": 1, "pieces": {"' + "7" * 5000 + '": [1, 2]}}', "[" * 100000,
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused_in_one_sentence(text, tmp_path):
    (tmp_path / PIECES_FILE).write_text(text)
    with pytest.raises(ValueError, match=PIECES_FILE) as said:
        read_pieces(tmp_path)
    assert "\n" not in str(said.value)


# ---- the real tokenizer


def test_hindi_is_as_short_as_promised(tmp_path):
    """Half of the sentences of a newspaper and passages teach; the other half and farmers' questions are counted."""
    data = real_data()
    sentences = dict.fromkeys((data / "hindi_text.txt").read_text().splitlines())
    halves: list[list[str]] = [[], []]
    for line in sentences:
        halves[hashlib.sha256(line.encode()).digest()[0] >= 128].append(line)
    for name, half in zip(("learned", "counted"), halves, strict=True):
        (tmp_path / f"{name}.txt").write_text("\n".join(half))
    source = str(data / "qwen3-0.6b")
    old = AutoTokenizer.from_pretrained(source).get_vocab().items()
    farmers = [line for line in (data / "farmer_questions_hi.txt").read_text().splitlines() if line.strip()]
    for pieces, news_limit, farmers_limit, rows in ((263, 2.65, 2.75, 151_936), (2000, 1.80, 1.95, 153_728)):
        output = tmp_path / str(pieces)
        given = [str(tmp_path / "learned.txt"), str(data / "hindi_qa_train.parquet")]
        tokens(source, given, pieces, str(output), validation=str(tmp_path / "counted.txt"))
        report = json.loads((output / REPORT_FILE).read_text())
        assert report["after"]["tokens_per_word"] <= news_limit
        assert report["round_trip"]["exact"] == report["counted"]["lines"] > 700
        assert report["matrix"]["rows_after"] == rows
        assert report["unshared_boundaries"]["count"] < 0.001 * report["unshared_boundaries"]["of"]
        chat = Chat.load(str(output))
        ids = [chat.encode_text(line) for line in farmers]
        assert sum(map(len, ids)) / sum(len(line.split()) for line in farmers) <= farmers_limit
        for line, one in zip(farmers, ids, strict=True):
            assert chat.tokenizer.decode(one) == unicodedata.normalize("NFC", line)
        assert old <= chat.tokenizer.get_vocab().items()
        assert min(read_pieces(output)) == 151_673
