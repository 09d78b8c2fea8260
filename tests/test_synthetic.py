"""The embedded corpus: what its card claims, proved from the tables and from the rows' own text."""

import itertools
import json
import re
import subprocess
import sys
import unicodedata

import pytest

from agri_moe.data import synthetic as syn
from agri_moe.data.synthetic import (
    BAND,
    CROP,
    CROPS,
    DIAGNOSES,
    FIELDS,
    GROUPS,
    NOTICE,
    PROBLEMS,
    SIGNS,
    STAGE,
    SYMPTOM,
    TREATMENTS,
    WEATHER,
    WEATHER_RULE,
    make_rows,
    score,
    train_tokenizer,
    write_corpus,
)

# The 27 of the draft order of 14 May 2020, others banned or restricted in India, and WHO Ia and Ib, as an
# advisory would name them in either script.
FORBIDDEN = """
acephate atrazine benfuracarb butachlor captan carbendazim carbofuran chlorpyrifos chlorpyriphos 2,4-d
deltamethrin dicofol dimethoate dinocap diuron malathion mancozeb methomyl monocrotophos oxyfluorfen
pendimethalin quinalphos sulfosulfuron thiodicarb thiophanate thiram zineb ziram
endosulfan phorate parathion triazophos paraquat dichlorvos carbosulfan propineb phosphamidon methamidophos
oxydemeton fipronil imidacloprid thiamethoxam glyphosate aldicarb ddt lindane aldrin dieldrin streptocycline
tricyclazole buprofezin phosphide cypermethrin profenofos
एसीफेट ऐसीफेट एट्राज़ीन एट्राजीन बेनफ्यूराकार्ब ब्यूटाक्लोर कैप्टान कैप्टन कार्बेन्डाजिम कार्बेंडाजिम कार्बेन्डाज़िम
कार्बोफ्यूरान क्लोरपायरीफॉस क्लोरपाइरीफॉस क्लोरोपायरीफॉस 2,4-डी डेल्टामेथ्रिन डाइकोफोल डायकोफोल डाइमेथोएट
डायमेथोएट डाइनोकैप डाययूरॉन डाइयूरॉन मैलाथियान मेलाथियान मैन्कोज़ेब मैंकोजेब मैन्कोजेब मेन्कोजेब मेथोमाइल मेथोमिल
मोनोक्रोटोफॉस मोनोक्रोटोफास ऑक्सीफ्लोरफेन पेंडीमेथालिन पेन्डीमेथालिन क्विनालफॉस क्विनालफास सल्फोसल्फ्यूरॉन
थायोडिकार्ब थायोफिनेट थायोफेनेट थायरम थिरम थाइरम ज़िनेब जिनेब ज़िरम जिरम
एंडोसल्फान एन्डोसल्फान फोरेट पैराथियान ट्रायज़ोफॉस ट्राइजोफॉस ट्रायजोफॉस पैराक्वाट डाइक्लोरवॉस डाईक्लोरवास कार्बोसल्फान
प्रोपिनेब फॉस्फामिडान ऑक्सीडेमेटॉन फिप्रोनिल इमिडाक्लोप्रिड थायोमेथोक्साम ग्लाइफोसेट लिंडेन एल्ड्रिन डीडीटी
स्ट्रेप्टोसाइक्लिन ट्राइसाइक्लाज़ोल बुप्रोफेज़िन फॉस्फाइड साइपरमेथ्रिन प्रोफेनोफॉस
"""


@pytest.fixture(scope="module")
def train():
    return make_rows(3000, seed=0, split="train")


@pytest.fixture(scope="module")
def validation():
    return make_rows(480, seed=0, split="validation")


@pytest.fixture(scope="module")
def rows(train, validation):
    return train + validation


@pytest.fixture(scope="module")
def tokenizer(train):
    return train_tokenizer(train)


def nfc(text):
    return unicodedata.normalize("NFC", text)


# What a reader without the generator can tell from a row: labels by looking wordings up, never by asking it.
LABEL = {
    nfc(field): {nfc(w): label for label, words in table.items() for w in words} for field, table in FIELDS.items()
}
SIGN = {nfc(wording): sign.name for sign in SIGNS.values() for wording in sign.wordings}


def read(row):
    """Crop, signs and labels of a row, from its text alone."""
    scenario = row["scenario"]
    labels = {field: LABEL[field][scenario[field]] for field in LABEL}
    signs = {SIGN[part] for part in re.split(", | और |; साथ ही ", scenario[SYMPTOM])}
    return scenario[CROP], signs, labels


def fitting(crop, signs, labels):
    """Brute force over the tables: every diagnosis of the crop that the signs and the given fields allow."""
    found = set()
    for group in GROUPS:
        for twin in group.twins:
            if group.crop != crop or not signs <= {*group.shared_signs, twin.third_sign}:
                continue
            allowed = {STAGE: group.stages, WEATHER: group.weathers, group.decided_by: twin.where}
            if all(value in allowed.get(field, (value,)) for field, value in labels.items()):
                found.add(nfc(twin.name))
    return found


def test_size_of_the_grammar():
    assert len(CROPS) >= 12
    assert len(PROBLEMS) >= 40
    assert len(DIAGNOSES) >= 40
    assert {problem.kind for problem in PROBLEMS} == {"pest", "disease", "deficiency", "weather"}
    assert all(sum(problem.crop == crop for problem in PROBLEMS) >= 4 for crop in CROPS)
    assert all(len(sign.wordings) >= 3 for sign in SIGNS.values())
    assert {group.decided_by for group in GROUPS} == set(FIELDS)


def test_tables_are_consistent():
    used = {sign for problem in PROBLEMS for sign in problem.signs}
    assert used == set(SIGNS)
    assert {twin.treatment for group in GROUPS for twin in group.twins} == set(TREATMENTS)
    wordings = [w for sign in SIGNS.values() for w in sign.wordings]
    assert len(set(wordings)) == len(wordings)
    for group in GROUPS:
        first, second = group.twins
        domain = {STAGE: group.stages, WEATHER: group.weathers}.get(group.decided_by, tuple(FIELDS[group.decided_by]))
        assert not set(first.where) & set(second.where)
        assert {*first.where, *second.where} <= set(domain)
        order = list(FIELDS[STAGE])
        assert all(
            order.index(SIGNS[s].since) <= order.index(stage) for s in group.shared_signs for stage in group.stages
        )


def test_every_sign_of_a_crop_points_to_two_problems():
    for crop in CROPS:
        problems = [problem for problem in PROBLEMS if problem.crop == crop]
        for sign in {sign for problem in problems for sign in problem.signs}:
            assert len([p for p in problems if sign in p.signs]) >= 2, (crop, sign)


def test_full_scenario_has_one_diagnosis_and_needs_two_fields_is_true(rows):
    for row in rows:
        crop, signs, labels = read(row)
        assert len(signs) == 2, row["scenario"]
        assert fitting(crop, signs, labels) == {row["diagnosis"]}
        for sign in signs:
            assert len(fitting(crop, {sign}, {})) >= 2
        alone = fitting(crop, signs, {})
        assert row["needs_two_fields"] == (len(alone) >= 2)
        if row["needs_two_fields"]:
            deciding = [field for field in labels if fitting(crop, signs, {field: labels[field]}) == {row["diagnosis"]}]
            assert len(deciding) == 1
            rest = {field: label for field, label in labels.items() if field != deciding[0]}
            assert len(fitting(crop, signs, rest)) >= 2
            assert f"{deciding[0]} {labels[deciding[0]]}" in row["thought"]
            assert all(name in row["thought"] for name in alone)


def test_share_that_needs_two_fields(validation):
    for n in (60, 240, 480):
        assert sum(row["needs_two_fields"] for row in validation[:n]) / n >= 1 / 3
    assert sum(not row["needs_two_fields"] for row in validation) / len(validation) >= 1 / 3


def test_every_problem_is_in_both_splits(train, validation):
    keys = {(problem.crop, nfc(problem.name)) for problem in PROBLEMS}
    for split in (train, validation):
        assert {(row["scenario"][CROP], row["diagnosis"]) for row in split} == keys


def combination(row):
    _, _, labels = read(row)
    return row["scenario"][CROP], row["diagnosis"], labels[STAGE], labels[WEATHER]


def test_held_out_combinations_never_occur_in_training(validation):
    held = {combination(row) for row in validation}
    for seed in range(3):
        assert held.isdisjoint(combination(row) for row in make_rows(2500, seed=seed, split="train"))
    every = {c for problem in PROBLEMS for c in syn.combinations(problem)}
    assert syn.held_out() < every
    assert 0.1 < len(syn.held_out()) / len(every) < 0.3


def test_held_out_combinations_ask_for_no_unseen_fact():
    for held in syn.held_out():
        problem = next(p for p in PROBLEMS if p.key == held.problem)
        seen = [c for c in syn.combinations(problem) if c not in syn.held_out()]
        assert any(BAND[c.stage] == BAND[held.stage] for c in seen)
        if problem.decided_by == STAGE:
            assert any(c.stage == held.stage for c in seen)
        if problem.decided_by == WEATHER:
            assert any(c.weather == held.weather for c in seen)


def test_action_depends_on_problem_stage_and_weather():
    by_problem = {p.key: {p.action(c.stage, c.weather) for c in syn.combinations(p)} for p in PROBLEMS}
    assert all(len(actions) >= 2 for actions in by_problem.values())
    blast = next(p for p in PROBLEMS if p.name == "झोंका रोग")
    assert blast.action("फूल", "वर्षा") == WEATHER_RULE["वर्षा"][0] + blast.action("फूल", "नम")
    assert blast.action("बढ़वार", "नम") != blast.action("फूल", "नम")
    assert "7 दिन बाद कटाई" in blast.action("पकाव", "नम")
    for problem, c in ((p, c) for p in PROBLEMS for c in syn.combinations(p)):
        action = problem.action(c.stage, c.weather)
        if c.weather == "वर्षा" and "छिड़कें" in action:
            assert action.startswith("वर्षा थमने पर"), action


def test_rows_are_a_function_of_seed_and_split():
    assert make_rows(50, seed=0, split="train") == make_rows(50, seed=0, split="train")
    assert make_rows(80, seed=0, split="train")[:50] == make_rows(50, seed=0, split="train")
    assert make_rows(50, seed=0, split="train") != make_rows(50, seed=1, split="train")
    assert make_rows(0, seed=0, split="train") == []
    code = (
        "import json; from agri_moe.data.synthetic import held_out, make_rows; "
        "print(json.dumps([make_rows(20, seed=7, split='validation'), sorted(held_out())]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert json.loads(outputs.pop())[0] == make_rows(20, seed=7, split="validation")


def test_rows_do_not_repeat_and_wording_varies(train):
    assert len({json.dumps(row["scenario"]) for row in train}) == len(train)
    texts = " ".join(row["scenario"][SYMPTOM] for row in train)
    assert all(wording in texts for wording in SIGN)
    assert len({row["thought"] for row in train}) > len(train) / 3


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"n": -1, "split": "train"}, "negative"), ({"n": 1, "split": "test"}, "split")]
)
def test_bad_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_rows(kwargs["n"], seed=0, split=kwargs["split"])


def test_true_advisory_scores_true_true(rows):
    for row in rows:
        assert row["diagnosis"] in row["advisory"]
        assert row["action"] in row["advisory"]
        assert score(row["advisory"], row) == (True, True)
        assert score(unicodedata.normalize("NFD", f"  {row['advisory']}\n"), row) == (True, True)


def test_advisory_of_another_row_scores_false(validation):
    for row, other in itertools.product(validation[:150], repeat=2):
        verdict = score(other["advisory"], row)
        assert verdict.diagnosis == (row["diagnosis"] == other["diagnosis"])
        assert verdict.action == (row["action"] == other["action"])


def test_score_refuses_hedging_and_takes_the_longest_name():
    row = {"diagnosis": "जड़ सड़न", "action": "नीम तेल 3 मिली प्रति लीटर छिड़कें"}
    row = {key: nfc(value) for key, value in row.items()}
    assert score("यह जड़ सड़न है। नीम तेल 3 मिली प्रति लीटर छिड़कें।", row) == (True, True)
    assert score("यह शुष्क जड़ सड़न है। शाम को नीम तेल 3 मिली प्रति लीटर छिड़कें।", row) == (False, False)
    assert score("यह जड़ सड़न या दीमक है।", row) == (False, False)
    assert score("यह जड़ सड़न है, जड़ सड़न।", row).diagnosis
    assert score("यह जड़ सड़नी है।", row) == (False, False)
    assert score("", row) == (False, False)


def test_action_wordings_hold_no_name_of_a_problem():
    for action, name in itertools.product(syn.all_actions(), DIAGNOSES):
        assert name not in action
    for action in syn.all_actions():
        assert score(action, {"diagnosis": "", "action": nfc(action)}) == (False, True)


def test_no_banned_or_highly_hazardous_substance(rows):
    tables = repr((SIGNS, TREATMENTS, GROUPS, sorted(syn.all_actions())))
    text = nfc(tables + json.dumps(rows, ensure_ascii=False)).lower()
    assert [name for name in FORBIDDEN.split() if nfc(name) in text] == []


def test_every_text_is_nfc_and_short(rows, tokenizer):
    from agri_moe.data.chat import DEFAULT_FORMAT, render_scenario

    lengths = []
    for row in rows:
        text = "\n".join((DEFAULT_FORMAT.default_system, DEFAULT_FORMAT.scenario_header))
        text += f"\n{render_scenario(row['scenario'])}\n{row['thought']}\n{row['advisory']}"
        assert text == nfc(text)
        lengths.append(len(tokenizer(text)["input_ids"]) + 9)  # five markers, and the newlines around them
    assert max(lengths) <= 145
    assert 80 <= sum(lengths) / len(lengths) <= 130


def test_tokenizer_round_trip(tokenizer, tmp_path):
    from transformers import AutoTokenizer, Qwen3Config

    assert len(tokenizer) <= 2048
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    # Beside a model's config, where transformers could take Qwen's own class and cut words at vowel signs.
    Qwen3Config().save_pretrained(tmp_path)
    beside_model = AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "धान में झोंका रोग है।",
        "किसान ने 12.5 किलो डाला\n\n  ठीक?",
        "🌾👩🏽‍🌾 ok",
        "tabs\tand\r\nlines \n",
        " ' s'll , .",
        "\x00\x7f é ж 稲",
    ]
    for text in map(nfc, texts):
        ids = tokenizer(text)["input_ids"]
        for loaded in (plain, beside_model):
            assert loaded(text)["input_ids"] == ids
            assert loaded.decode(ids) == text
    assert {chr(b) for b in range(33, 127)} <= set(tokenizer.get_vocab())
    assert len([t for t in tokenizer.get_vocab() if len(t) == 1]) == 256
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id]


def test_tokenizer_keeps_devanagari_words_whole(tokenizer):
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("पत्तियाँ झुलसी हैं")
    assert len(pieces) == 3
    assert len(tokenizer(" पत्तियाँ")["input_ids"]) == 1
    assert "<|user|>" not in tokenizer.get_vocab()


def test_tokenizer_is_the_same_every_time(train):
    first, second = (train_tokenizer(train[:300], vocab_size=600) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) == 600
    with pytest.raises(ValueError, match="at least 257"):
        train_tokenizer(train[:1], vocab_size=100)


def test_corpus_is_written_and_read_back(tmp_path, capsys):
    from datasets import load_dataset
    from transformers import AutoTokenizer

    from agri_moe.tools.corpus import corpus

    folder = tmp_path / "new" / "corpus"
    corpus(str(folder), train_rows=120, validation_rows=30, seed=3, vocab_size=700)
    printed = capsys.readouterr().out
    assert "120 training rows, 30 validation rows" in printed
    assert NOTICE in printed
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "tokenizer",
        "train.parquet",
        "validation.parquet",
    ]
    assert [p.name for p in folder.parent.iterdir()] == ["corpus"]
    data = load_dataset(
        "parquet",
        data_files={s: str(folder / f"{s}.parquet") for s in ("train", "validation")},
        cache_dir=str(tmp_path / "cache"),
    )
    for split, n in (("train", 120), ("validation", 30)):
        assert data[split].to_list() == make_rows(n, seed=3, split=split)
    assert len(AutoTokenizer.from_pretrained(folder / "tokenizer")) == 700
    assert NOTICE in (folder / "README.md").read_text("utf-8")


def test_existing_output_is_refused_unless_overwritten(tmp_path):
    folder = tmp_path / "corpus"
    small = {"train_rows": 20, "validation_rows": 5, "vocab_size": 300}
    write_corpus(folder, **small)
    before = (folder / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        write_corpus(folder, **small, seed=1)
    assert (folder / "train.parquet").read_bytes() == before
    write_corpus(folder, **small, seed=1, overwrite=True)
    assert (folder / "train.parquet").read_bytes() != before
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("precious")
    with pytest.raises(ValueError, match="not an earlier corpus"):
        write_corpus(other, **small, overwrite=True)
    assert (other / "chapter.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus", "thesis"]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(syn, "_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_corpus(tmp_path / "corpus", train_rows=20, validation_rows=5, vocab_size=300)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="train_rows must be at least 1"):
        write_corpus(tmp_path / "corpus", train_rows=0)


def test_notice_speaks_both_languages():
    assert "सलाह नहीं" in NOTICE
    assert "not agricultural advice" in NOTICE
    assert "not advice" in (syn.__doc__ or "")


def test_tool_is_light_to_import():
    code = (
        "import sys, agri_moe.tools.corpus; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
