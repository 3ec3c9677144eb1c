"""Weight formats: how a file or folder of tensors becomes an encoder, and back.

`files` reads tensors safely (`safe` for safetensors, `archive` for torch's zip files) without knowing what they mean;
`openai`, `open_clip`, `huggingface` and `native` map names (`keymap`), configuration, preprocessing and tokenizer
(`tokens`); `build` checks and assembles; `hub` finds files in folders, in the local cache and, if asked, on the hub.
"""
