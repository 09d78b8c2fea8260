"""The exported folder: what other tools read in it, the model card, and what a failed export leaves alone."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from jinja2 import Template
from test_cli import refused
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agri_moe.cli import main
from agri_moe.data.chat import render_scenario
from agri_moe.data.synthetic import NOTICE, make_rows
from agri_moe.model_card import NO_SUBSTITUTE, base_model
from agri_moe.tools import export as module

ROOT = Path(__file__).parents[1]
STOPS = ROOT / "scripts" / "stops.py"
LM_EVAL = ROOT / "docs" / "lm_eval"


def test_a_run_is_exported_with_all_that_a_server_reads_and_a_card(distill_config, corpus, tmp_path, capsys):
    config = yaml.safe_load(distill_config.read_text())
    config["model"]["init_args"]["max_new_tokens"] = 60
    distill_config.write_text(yaml.safe_dump(config, allow_unicode=True))
    cli = main(["fit", f"--config={distill_config}"])
    checkpoints = cli.run.folder / "checkpoints"
    folder = tmp_path / "advisor"
    measured = {"chrf": {"value": 61.26, "n": 24, "of": "rows", "interval_95": [60.0, 62.5]}}
    found = {"checkpoint": str(checkpoints / "step=00000006.ckpt"), "metrics": measured}
    (cli.run.folder / "evaluation.json").write_text(json.dumps(found))
    common = ["--dtype", "float32", "--run_root", str(tmp_path)]
    main(["export", "--output", str(folder), "--license", "cc-by-4.0", *common])

    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|endoftext|>")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == end
    assert generation["max_new_tokens"] == 60
    assert not {"use_cache", "_from_model_config"} & {key for key, value in generation.items() if value is not None}
    values = json.loads((folder / "config.json").read_text())
    assert values["num_experts"] == values["num_local_experts"] == 4
    assert values["norm_topk_prob"] is values["use_cache"] is True
    assert values["eos_token_id"] == end
    assert values["torch_dtype"] == "float32"
    assert json.loads((folder / "export.json").read_text())["checkpoint"].endswith("step=00000006.ckpt")

    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "language": ["hi"],
        "license": "cc-by-4.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["agri_moe", "mixture-of-experts", "knowledge-distillation", "agriculture", "conversational"],
    }
    assert NO_SUBSTITUTE in card.text
    assert NOTICE in card.text, "the rows lie beside the notice"
    assert "| Objective | 0.5 ce + 1.0 kl + 0.1 cka + 0.01 balance + 0.001 router_z |" in card.text
    assert f"| Training rows | {corpus}/train.parquet |" in card.text
    assert "| Steps | 6; the run: 6 of 6 planned |" in card.text
    logged = float(cli.trainer.callback_metrics["val/kl"])
    assert f"| kl | {logged:.4g} |" in card.text
    assert "after step 6" in card.text
    assert "| chrf | 61.26 | 60 to 62.5 | 24 rows |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0].replace('"advisor"', repr(str(folder)))
    exec(code, {})

    # Of an earlier checkpoint the card tells nothing that was measured later, or of another.
    main(["export", "--output", str(tmp_path / "earlier"), "--checkpoint", str(checkpoints / "step=00000004.ckpt")])
    earlier = ModelCard.load(tmp_path / "earlier" / "README.md")
    assert "left no validation up to this checkpoint" in earlier.text
    assert "| Steps | 4; the run: 6 of 6 planned |" in earlier.text
    assert "chrf" not in earlier.text
    assert earlier.data.license is None
    assert "none was given when it was exported" in earlier.text


def test_a_plain_tokenizer_takes_answers_apart(chat, tmp_path):
    """What `transformers serve` does: thought and advisory apart, with and without a thought, in a second turn too."""
    chat.save(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    row = make_rows(1, seed=1, split="train")[0]
    for asked, thinking in ((row, True), (row | {"thought": None}, False)):
        *before, answer = chat.messages(asked)
        for messages in (before, [*before, answer, *before[1:]]):
            prefix = plain.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            whole = plain.apply_chat_template([*messages, answer], tokenize=False)
            assert whole.startswith(prefix)
            written = plain.encode(whole.removeprefix(prefix), add_special_tokens=False)
            parsed = plain.parse_response(written, prefix=prefix)
            assert parsed == {name: text.strip() for name, text in answer.items()}


def test_a_model_of_no_run_says_that_nothing_is_known(dense, tmp_path):
    main(["export", "--checkpoint", str(dense), "--output", str(tmp_path / "plain")])
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert "belongs to no run: how that was trained is unknown here" in card.text
    assert "language" not in card.data.to_dict()
    assert card.data.tags == ["agri_moe"]


def test_a_base_model_is_named_only_where_the_hub_had_it(tmp_path, monkeypatch):
    cached = {"Qwen/Qwen3-0.6B": "/cache/config.json"}
    monkeypatch.setattr("agri_moe.model_card.try_to_load_from_cache", lambda name, _: cached.get(name))
    monkeypatch.chdir(tmp_path)
    upcycled = tmp_path / "work" / "student"
    upcycled.mkdir(parents=True)
    (upcycled / "upcycle.json").write_text(json.dumps({"source": "Qwen/Qwen3-0.6B"}))
    assert base_model("work/student") == base_model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_model("demo_output/upcycled") is None
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    assert base_model("Qwen/Qwen3-0.6B") is None


def test_an_export_that_fails_its_proof_leaves_the_old_folder(dense, tmp_path, monkeypatch):
    target = tmp_path / "advisor"
    arguments = ["export", "--checkpoint", str(dense), "--output", str(target), "--dtype", "float32"]
    main(arguments)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    write = module._write_huggingface

    def damaged(folder, model):
        with torch.no_grad():
            model.model.norm.weight[0] += 1
            write(folder, model)
            model.model.norm.weight[0] -= 1

    monkeypatch.setattr(module, "_write_huggingface", damaged)
    with pytest.raises(RuntimeError, match="the logits differ.*it was not put in place"):
        main([*arguments, "--overwrite", "true"])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_mistakes_are_told_before_anything_is_loaded(dense, tmp_path, capsys, no_models):
    arguments = ["export", "--checkpoint", str(dense), "--output"]
    assert "--license Apache 2.0 is no identifier" in refused(
        capsys, *arguments, str(tmp_path / "new"), "--license", "Apache 2.0"
    )
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    message = refused(capsys, *arguments, str(tmp_path / "letters"), "--overwrite", "true")
    assert "is no model folder" in message
    assert (tmp_path / "letters" / "dear.txt").exists()


def saying(token, weight, vocabulary):
    """A model that is certain about one token whatever it reads: that it comes, or that it does not."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = AutoConfig.for_model("qwen3", vocab_size=vocabulary, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_input_embeddings().weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[token] = weight
    return model


def test_the_harness_task_asks_as_we_do_and_counts_what_it_says():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((LM_EVAL / "diagnosis.yaml").read_text(), Loader)
    process_results = runpy.run_path(str(LM_EVAL / "scores.py"))["process_results"]
    for row in make_rows(20, seed=1, split="validation"):
        asked = Template(task["doc_to_text"]).render(scenario=row["scenario"] | {"note": None})
        assert asked == render_scenario(row["scenario"])
        assert process_results(row, [f"{row['thought']}\n\n{row['advisory']}\n"]) == {"diagnosis": 1.0, "action": 1.0}
        assert process_results(row, [f"{row['diagnosis']}\n\nपानी दें।"]) == {"diagnosis": 0.0, "action": 0.0}


def test_answers_that_end_by_themselves_are_counted_without_this_package(corpus, chat, tmp_path):
    rows = corpus / "validation.parquet"
    for weight, status, printed in ((1.0, 0, "5 of 5"), (-1.0, 1, "0 of 5")):
        folder = tmp_path / str(weight)
        model = saying(chat.end_id, weight, len(chat.tokenizer))
        model.generation_config = GenerationConfig(eos_token_id=chat.end_id, pad_token_id=chat.pad_id, max_new_tokens=4)
        model.save_pretrained(folder)
        chat.save(folder)
        program = [sys.executable, str(STOPS), "--model", str(folder), "--input", str(rows), "--rows", "5"]
        result = subprocess.run(program, capture_output=True, text=True, check=False)
        assert (result.stdout.strip(), result.returncode) == (printed, status), result.stderr
