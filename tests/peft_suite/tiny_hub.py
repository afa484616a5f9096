"""Fills a Hub cache with tiny random models under the names that PEFT's tests ask for, so that the tests run offline.

HF_HOME=folder python tiny_hub.py LoraConfig | MAnyConfig     # the config class of the adapters among them
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

TOKENS = {"vocab_size": 1100, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
FFN = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 2, "decoder_layers": 2}
SEQ2SEQ = {**TOKENS, **FFN, "d_model": 24, "encoder_attention_heads": 4, "decoder_attention_heads": 4}

OPT = {**TOKENS, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_attention_heads": 4}
LARGER_OPT = {**OPT, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 12}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
BLOOM = {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
BERT = {**TOKENS, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
DEBERTA = {**BERT, "pos_att_type": ["c2p", "p2c"], "relative_attention": True}
T5 = {**TOKENS, "eos_token_id": 1, "decoder_start_token_id": 0, "d_model": 32, "d_ff": 37, "d_kv": 8, "num_heads": 4}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
LLAMA = {
    **TOKENS,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
WIDE_HEADS = {**LLAMA, "head_dim": 8}
GEMMA3 = {**WIDE_HEADS, "sliding_window": 32}
EXPERTS = {**WIDE_HEADS, "num_experts_per_tok": 2}
QWEN3_MOE = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}
LLAMA4 = {**EXPERTS, "num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}

# The name on the Hub; the config class; the model class; the configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-uncased": ("Bert", "BertModel", BERT),
    "google/flan-t5-small": ("T5", "T5ForConditionalGeneration", T5),
    "gpt2": ("GPT2", "GPT2LMHeadModel", GPT2),
    "hf-internal-testing/Mixtral-tiny": ("Mixtral", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 4}),
    "hf-internal-testing/tiny-qwen3-moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", QWEN3_MOE),
    "hf-internal-testing/tiny-random-BertModel": ("Bert", "BertModel", BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3Text", "Gemma3ForCausalLM", GEMMA3),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("Mistral", "MistralForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2", "GPT2LMHeadModel", GPT2),
    "peft-internal-testing/opt-125m": ("OPT", "OPTForCausalLM", LARGER_OPT),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPText", "CLIPTextModel", BERT),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", "Qwen2ForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "Bart",
        "BartForConditionalGeneration",
        SEQ2SEQ,
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("Bert", "BertForSequenceClassification", BERT),
    "peft-internal-testing/tiny-random-BertModel": ("Bert", "BertModel", BERT),
    "peft-internal-testing/tiny-random-BloomForCausalLM": ("Bloom", "BloomForCausalLM", BLOOM),
    "peft-internal-testing/tiny-random-DebertaModel": ("Deberta", "DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2", "DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2", "GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJ", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoX", "GPTNeoXForCausalLM", BERT),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPT", "OPTForCausalLM", {**OPT, "num_hidden_layers": 5}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNet",
        "ResNetForImageClassification",
        RESNET,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "Roberta",
        "RobertaForSequenceClassification",
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaModel": ("Roberta", "RobertaModel", BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5", "T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5",
        "T5ForConditionalGeneration",
        T5,
    ),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2", "GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-t5": ("T5", "T5ForConditionalGeneration", T5),
    "peft-internal-testing/whisper": ("Whisper", "WhisperForConditionalGeneration", SEQ2SEQ),
    "Qwen/Qwen2-0.5B": ("Qwen2", "Qwen2ForCausalLM", LLAMA),
    "tiiuae/falcon-mamba-tiny-dev": ("FalconMamba", "FalconMambaForCausalLM", MAMBA),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        "GptOss",
        "GptOssForCausalLM",
        {**EXPERTS, "num_local_experts": 4},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4Text", "Llama4ForCausalLM", LLAMA4),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "Llama",
        "LlamaForSequenceClassification",
        LLAMA,
    ),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3", "Qwen3ForCausalLM", WIDE_HEADS),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": ("Qwen3Moe", "Qwen3MoeForCausalLM", QWEN3_MOE),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", "LlamaForCausalLM", LLAMA),
}

# The name on the Hub after "peft-internal-testing/"; that of the base model; the auto class that loads it; the task.
ADAPTERS = {
    "gpt2-lora-random": ("tiny-random-gpt2", "AutoModelForCausalLM", "CAUSAL_LM"),
    "opt-125m-dummy-lora": ("opt-125m", "AutoModelForCausalLM", "CAUSAL_LM"),
    "tiny-OPTForCausalLM-lora": ("tiny-random-OPTForCausalLM", "AutoModelForCausalLM", "CAUSAL_LM"),
    "tiny-random-BertModel-lora": ("tiny-random-BertModel", "AutoModel", None),
    "tiny_GPT2ForTokenClassification-lora": ("tiny-random-gpt2", "AutoModelForTokenClassification", "TOKEN_CLS"),
    "tiny_OPTForFeatureExtraction-lora": ("tiny-random-OPTForCausalLM", "AutoModel", "FEATURE_EXTRACTION"),
    "tiny_OPTForQuestionAnswering-lora": (
        "tiny-random-OPTForCausalLM",
        "AutoModelForQuestionAnswering",
        "QUESTION_ANS",
    ),
    "tiny_OPTForSequenceClassification-lora": (
        "tiny-random-OPTForCausalLM",
        "AutoModelForSequenceClassification",
        "SEQ_CLS",
    ),
    "tiny_T5ForSeq2SeqLM-lora": ("tiny-random-t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "tiny_WhisperForConditionalGeneration-lora": ("whisper", "AutoModelForSpeechSeq2Seq", None),
}

_REVISION = "0" * 40


def _snapshot(name: str) -> Path:
    """The empty folder in which the Hub's cache looks for the repository."""
    repository = Path(os.environ["HF_HOME"], "hub", "models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(_REVISION)
    return snapshot


def _tokenizer() -> transformers.PreTrainedTokenizerBase:
    """A token for each byte."""
    names = ["<pad>", "<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def fill(config_class: Any) -> None:
    """Write everything into the cache. What cannot be built with the installed transformers is left out, aloud."""
    from peft import get_peft_model

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = _tokenizer()
    for name, (config, model_class, content) in MODELS.items():
        torch.manual_seed(0)
        try:
            model = getattr(transformers, model_class)(getattr(transformers, f"{config}Config")(**content))
        except Exception as error:
            print(f"Not built: {name}: {error!r}", file=sys.stderr)
            continue
        folder = _snapshot(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for name, (base, auto, task) in ADAPTERS.items():
        try:
            model = getattr(transformers, auto).from_pretrained(f"peft-internal-testing/{base}")
            targets = ["q_proj", "v_proj"] if base == "whisper" else None
            model = get_peft_model(model, config_class(task_type=task, target_modules=targets))
        except Exception as error:
            print(f"Not built: {name}: {error!r}", file=sys.stderr)
            continue
        model.save_pretrained(_snapshot(f"peft-internal-testing/{name}"))


if __name__ == "__main__":
    import peft

    import peft_many

    fill({"LoraConfig": peft.LoraConfig, "MAnyConfig": peft_many.MAnyConfig}[sys.argv[1]])
