"""Tokenizers: the byte-pair vocabulary of CLIP (`bpe`) and every `tokenizer.json` model (`pretrained`)."""
