"""Offline use: prompts in, completions out, with a tiny checkpoint and a tokenizer of single bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.end_to_end.small_v25 import PUBLISHED, SMALLER

from ziphius import LLM
from ziphius.engine.engine import Engine
from ziphius.errors import ConfigError, ContextLengthExceeded, InvalidRequest, ModelError, ModelNotFound
from ziphius.ipc.messages import SamplingParams

BYTES = 256
END = BYTES


def save_tiny(folder: Path, with_tokenizer: bool) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=BYTES + 8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if with_tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["<end>"])
        core.save(str(folder / "tokenizer.json"))
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}answer: "
        settings = {"eos_token": "<end>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llm"), with_tokenizer=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), dtype="float32", max_total_tokens=2048, threads=1)


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 8, "temperature": 0.0, "seed": 0, "ignore_eos": True} | options))


def test_completions_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = ["a whale", "b", "a longer prompt than the others"]
    together = llm.generate(prompts, greedy())
    alone = [llm.generate(prompt, greedy())[0] for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert llm.tokenizer is not None
    for prompt, one in zip(prompts, together, strict=True):
        assert one.prompt_ids == llm.tokenizer.encode(prompt)
        assert one.text == llm.tokenizer.decode(one.token_ids)
        assert (len(one.token_ids), one.finish_reason) == (8, "length")


def test_token_ids_do_as_well_as_text(llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("a whale")
    (of_text,) = llm.generate("a whale", greedy())
    assert llm.generate(ids, greedy())[0].token_ids == of_text.token_ids
    assert llm.generate([ids, "b"], greedy())[0].token_ids == of_text.token_ids


def test_each_prompt_may_have_its_own_sampling(llm: LLM) -> None:
    each = [
        greedy(max_new_tokens=3),
        greedy(logprobs=True, top_logprobs=2, prompt_logprobs_from=0),
        greedy(logit_bias={END: 1000.0}, ignore_eos=False),
    ]
    short, told, ended = llm.generate(["one", "two", "three"], each)
    assert len(short.token_ids) == 3
    assert [one.token_id for one in told.logprobs] == told.token_ids
    assert [one.token_id for one in told.prompt_logprobs] == told.prompt_ids
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([END], "", "stop")
    with pytest.raises(InvalidRequest, match="2 prompts, but 1"):
        llm.generate(["a", "b"], [greedy()])


def test_without_sampling_two_answers_differ(llm: LLM) -> None:
    first, second = llm.generate(["same", "same"])
    assert first.token_ids != second.token_ids


def test_chat_goes_through_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "hi"}], greedy())
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(answer.prompt_ids) == "user: hi\nanswer: "
    assert answer.token_ids == llm.generate("user: hi\nanswer: ", greedy())[0].token_ids


def test_what_cannot_run_is_refused_before_anything_does(llm: LLM) -> None:
    with pytest.raises(ContextLengthExceeded, match="128"):
        llm.generate(["fine", [1] * 128], greedy())
    with pytest.raises(InvalidRequest, match=r"outside 0\.\.263"):
        llm.generate([[1, 264]], greedy())
    with pytest.raises(InvalidRequest, match="no tokens"):
        llm.generate([""], greedy())
    with pytest.raises(InvalidRequest, match="logit_bias"):
        llm.generate(["a"], greedy(logit_bias={264: 1.0}))
    assert llm.generate([], greedy()) == []


def test_an_interruption_leaves_the_engine_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(3))
    turn = Engine.turn
    engines: set[Engine] = set()

    def interrupted(engine: Engine) -> None:
        engines.add(engine)
        if next(turns, None) is None:
            monkeypatch.undo()
            raise KeyboardInterrupt
        turn(engine)

    monkeypatch.setattr(Engine, "turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["long", "longer"], greedy(max_new_tokens=100))
    assert [engine.idle for engine in engines] == [True]
    assert len(llm.generate(["a whale"], greedy())[0].token_ids) == 8


def test_a_checkpoint_without_a_tokenizer_takes_ids(tmp_path: Path, llm: LLM) -> None:
    bare = LLM(str(save_tiny(tmp_path, with_tokenizer=False)), dtype="float32", max_total_tokens=512)
    (answer,) = bare.generate([[1, 2, 3]], greedy())
    assert answer.token_ids == llm.generate([[1, 2, 3]], greedy())[0].token_ids
    assert answer.text == ""
    with pytest.raises(ModelError, match="no tokenizer"):
        bare.generate(["text"], greedy())


def test_two_models_live_in_one_process(folder: Path, llm: LLM) -> None:
    other = LLM(str(folder), dtype="bfloat16", max_total_tokens=256)
    assert len(other.generate("a whale", greedy())[0].token_ids) == 8
    assert len(llm.generate("a whale", greedy())[0].token_ids) == 8


def test_options_are_those_of_serve(folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean page_size"):
        LLM(str(folder), pagesize=4)
    with pytest.raises(ModelNotFound):
        LLM(str(folder / "nowhere"))


def test_a_config_is_enough_for_dummy_weights(tmp_path: Path) -> None:
    """DeepSeek-V2.5's own config with smaller numbers, and every other setting at its default; bytes are the tokens."""
    path = tmp_path / "small-v2.5.json"
    path.write_text(json.dumps(json.loads(PUBLISHED.read_text()) | SMALLER))
    llm = LLM(str(path), load_format="dummy", device="cpu", context_length=128, max_total_tokens=256, threads=1)
    one, two = llm.generate(
        ["hello", "你好"], SamplingParams(max_new_tokens=12, temperature=0.0, seed=0, ignore_eos=True)
    )
    assert (len(one.token_ids), len(two.token_ids)) == (12, 12)
    assert (one.prompt_ids, two.prompt_ids) == (list(b"hello"), list("你好".encode()))
    assert one.token_ids != two.token_ids
