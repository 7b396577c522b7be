"""Writes a folder in Hugging Face's format with fresh weights in the shape of a published model: SHAPE FOLDER.

For benchmarks where no pretrained model is at hand. Its tokenizer has the vocabulary's size, but knows single bytes only.
"""

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

VOCABULARY = 49152
# Of SmolLM2: layers, channels, query heads, key/value heads, channels of the feed-forward. The larger one has 32 layers.
SHAPES = {"135m": (30, 576, 9, 3, 1536), "360m": (12, 960, 15, 5, 2560)}

shape, folder = sys.argv[1:]
layers, channels, heads, kv_heads, wide = SHAPES[shape]
set_seed(0)
config = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=channels, intermediate_size=wide, num_hidden_layers=layers,
    num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192, rope_theta=100000.0,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)
LlamaForCausalLM(config).save_pretrained(folder)
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
unused = [f"<unused_{i}>" for i in range(VOCABULARY - len(alphabet))]
tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet + unused)}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
