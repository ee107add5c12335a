"""A small random Llama as a GGUF file, and the same in PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

WORDS, BYTES, WIDTH, BLOCKS, HEADS = 61, 259, 64, 4, 2


def tiny_llama(words: int = WORDS) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def write_gguf(model: LlamaForCausalLM, path: Path) -> Path:
    """As llama.cpp reads it: the rotated halves of queries and keys lie interleaved. A model of 259 words reads bytes."""
    writer = GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(config.vocab_size)
    if config.vocab_size == BYTES:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))])
        writer.add_token_scores([0.0] * BYTES)
        writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256])
    else:
        writer.add_tokenizer_model("no_vocab")

    def interleaved(weight: Tensor) -> Tensor:
        return weight.reshape(HEADS, 2, -1, WIDTH).transpose(1, 2).reshape(weight.shape)

    tensors = {
        "token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight, "output": model.lm_head.weight
    }  # fmt: skip
    for i, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        tensors |= {
            f"blk.{i}.attn_norm": block.input_layernorm.weight, f"blk.{i}.ffn_norm": block.post_attention_layernorm.weight,
            f"blk.{i}.attn_q": interleaved(attention.q_proj.weight), f"blk.{i}.attn_k": interleaved(attention.k_proj.weight),
            f"blk.{i}.attn_v": attention.v_proj.weight, f"blk.{i}.attn_output": attention.o_proj.weight,
            f"blk.{i}.ffn_gate": mlp.gate_proj.weight, f"blk.{i}.ffn_up": mlp.up_proj.weight,
            f"blk.{i}.ffn_down": mlp.down_proj.weight,
        }  # fmt: skip
    for name, weight in tensors.items():
        writer.add_tensor(f"{name}.weight", weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
